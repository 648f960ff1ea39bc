"""The loader: one stream for any number of ranks and workers, ignoring signals, keeping errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from data_worlds import open_plan, write
from forked import forked_children

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.workers.process import IGNORED_SIGNALS
from onellm_dist.data.device_copy import copy_ahead, get_copy_stream
from onellm_dist.data.loader import Loader
from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.data.plan import Plan
from onellm_dist.data.token_counts import get_token_count_path
from onellm_dist.packed import PackedBatch

MIXTURE = {"pic": 2.0, "imu": 1.0, "talk": 1.0, "both": 0.5}
STEPS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    write(root, "pic", ["image"], 40, broken=[3, 17])
    write(root, "imu", ["imu"], 25)
    write(root, "talk", [], 11)
    write(root, "both", ["image", "imu"], 16)
    return root


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [
        p
        for p in psutil.Process().children(recursive=True)
        if p not in before and "resource_tracker" not in " ".join(p.cmdline())
    ]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive


def run(
    plan: Plan, world_size: int, rank: int, workers: int, first: int = 0, last: int = STEPS
) -> list[tuple[MicroBatch, PackedBatch]]:
    with Loader(plan, world_size, rank, first, last, workers) as loader:
        return list(loader)


def fingerprint(batch: PackedBatch) -> tuple[object, ...]:
    """Everything of a batch, to compare."""
    values = {
        name: (
            tuple(value.shape),
            value.double().sum().item(),
            value.double().square().sum().item(),
        )
        for name, value in batch.values.items()
    }
    return (
        batch.input_ids.tolist(),
        batch.labels.tolist(),
        batch.text_token_counts,
        batch.modalities,
        batch.weights.tolist(),
        batch.sample_ids,
        batch.is_empty,
        sorted(batch.skipped_samples),
        sorted(values.items()),
    )


def by_sample(
    batches: list[tuple[MicroBatch, PackedBatch]],
) -> dict[int, dict[str, tuple[object, ...]]]:
    """Step to sample id to what was read of it, however it was packed: text, weight, sums."""
    found: dict[int, dict[str, tuple[object, ...]]] = {}
    for micro, batch in batches:
        taken = dict.fromkeys(batch.values, 0)
        pieces = batch.input_ids.split(list(batch.text_token_counts))
        for i, name in enumerate(batch.sample_ids):
            sums = []
            for modality in batch.modalities[i]:
                sums.append(batch.values[modality][taken[modality]].double().sum().item())
                taken[modality] += 1
            of_step = found.setdefault(micro.step, {})
            assert name not in of_step
            of_step[name] = (
                tuple(pieces[i].tolist()),
                batch.weights[i].item(),
                tuple(sums),
                i in batch.skipped_samples,
            )
    return found


PAIRS = [
    (world_size, workers)
    for world_size in (1, 2, 3, 4, 5, 8)
    for workers in (0, 1, 3)
    if workers < 3 or world_size in (2, 5)
]
"""Three workers per rank for 8 ranks would only cost time."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "pairs",
    [[(1, 1), (2, 3), (3, 1), (5, 0), (8, 0)], pytest.param(PAIRS, marks=pytest.mark.soak)],
    ids=["some pairs", "all pairs"],
)
def test_one_stream_for_any_number_of_ranks_and_workers(
    root: Path, pairs: list[tuple[int, int]]
) -> None:
    """1 to 8 ranks with 0, 1 or 3 workers, and corrupt samples: every step is the same."""
    plan = open_plan(root, MIXTURE)
    expected = by_sample(run(plan, 1, 0, 0))
    skipped = [read[3] for step in expected.values() for read in step.values()]
    assert any(skipped)
    digests = [plan.digest(step) for step in range(STEPS)]
    for world_size, workers in pairs:
        again = open_plan(root, MIXTURE, workers=workers)
        assert [again.digest(step) for step in range(STEPS)] == digests
        batches = [
            pair for rank in range(world_size) for pair in run(again, world_size, rank, workers)
        ]
        assert by_sample(batches) == expected, (world_size, workers)


def test_workers_give_the_same_batches_in_the_same_order(root: Path) -> None:
    plan = open_plan(root, MIXTURE, pack_llm_tokens=200)
    alone, two = run(plan, 2, 1, 0), run(plan, 2, 1, 2)
    assert [(m.step, m.index) for m, _ in alone] == [
        (s, i) for s in range(STEPS) for i in range(plan.step(s, 2).ranks[1][0].count)
    ]
    assert [m for m, _ in two] == [m for m, _ in alone]
    assert [fingerprint(b) for _, b in two] == [fingerprint(b) for _, b in alone]


def test_a_loader_can_start_at_any_step(root: Path) -> None:
    plan = open_plan(root, MIXTURE)
    whole = [fingerprint(batch) for micro, batch in run(plan, 2, 0, 0) if micro.step >= 1]
    assert [
        fingerprint(batch) for _, batch in run(open_plan(root, MIXTURE), 2, 0, 0, first=1)
    ] == whole


@pytest.mark.slow
def test_workers_continue_when_the_job_is_signalled(root: Path) -> None:
    plan = open_plan(root, MIXTURE, pack_llm_tokens=160)
    expected = [fingerprint(batch) for _, batch in run(plan, 1, 0, 0)]
    found = []
    with Loader(plan, 1, 0, 0, STEPS, 2) as loader:
        for number, (_, batch) in enumerate(loader):
            found.append(fingerprint(batch))
            if number == 0:
                workers = forked_children()
                assert len(workers) == 2
                for worker in workers:
                    for sent in IGNORED_SIGNALS:
                        os.kill(worker.pid, sent)
    assert found == expected
    assert signal.SIGTERM in IGNORED_SIGNALS


ORPHANS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import psutil
from data_worlds import open_plan
from onellm_dist.data.loader import Loader
for _ in Loader(open_plan(Path(sys.argv[2]), {"talk": 1}), 1, 0, 0, 10**6, 2):
    print(*(p.pid for p in psutil.Process().children()), flush=True)
    if sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(0)  # the iterator is still alive here
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("exit", 0)])
def test_workers_end_with_the_training_process(root: Path, how: str, code: int) -> None:
    """They ignore SIGTERM, so the end of a process, killed or not, must not depend on it."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS, str(Path(__file__).parent), str(root), how],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not list(filter(lives, pids))


def lives(pid: int) -> bool:
    """Whether a process runs; in a container without an init, one that ended stays a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_runs_random_numbers_are_left_alone(root: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(open_plan(root, MIXTURE), 1, 0, 1, last=1)
    assert torch.equal(torch.rand(3), expected)


def test_leaving_early_ends_the_workers(root: Path) -> None:
    with Loader(open_plan(root, MIXTURE), 1, 0, 0, 1000, 2) as loader:
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reader_error_arrives_unchanged(tmp_path: Path, workers: int) -> None:
    dataset = write(tmp_path, "talk", [], 7)
    plan = open_plan(tmp_path, {"talk": 1}, global_batch=7)
    path = get_token_count_path(dataset, dataset.shards()[0], plan.corpus.text_encoder.fingerprint)
    np.save(path, np.load(path) + 1)
    with pytest.raises(OneLLMError) as info:
        run(open_plan(tmp_path, {"talk": 1}, global_batch=7), 1, 0, workers)
    assert info.value.what.startswith("stale token counts")
    assert "Traceback" not in str(info.value)


def test_a_plan_error_arrives_unchanged(root: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.pack_llm_tokens is 40"):
        run(open_plan(root, MIXTURE, pack_llm_tokens=40), 1, 0, 1)


def test_known_skipped_samples_reach_the_workers(root: Path) -> None:
    plan = open_plan(root, {"talk": 1}, global_batch=4)
    name = plan.corpus.sample_id(plan.samples(0)[1])
    with Loader(plan, 1, 0, 0, 1, 1, skipped_samples={name: "lost before"}) as loader:
        batches = [batch for _, batch in loader]
    assert [
        (b.sample_ids[i], reason) for b in batches for i, reason in b.skipped_samples.items()
    ] == [(name, "lost before")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: pinning needs one")
def test_batches_are_pinned(root: Path) -> None:
    with Loader(open_plan(root, MIXTURE), 1, 0, 0, 1, 1) as loader:
        for micro, batch in loader:
            assert isinstance(micro, MicroBatch)
            assert batch.input_ids.is_pinned()
            assert all(value.is_pinned() for value in batch.values.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to copy to")
def test_batches_are_copied_ahead_on_a_stream_of_their_own(root: Path) -> None:
    """They hold what was read, though the GPU is busy when they are copied, and after it."""
    plan, device = open_plan(root, MIXTURE), torch.device("cuda", torch.cuda.current_device())
    busy, sums = torch.rand(4096, 4096, device=device), []
    with Loader(plan, 1, 0, 0, STEPS, 0, device=device) as loader:
        for _, batch in loader:
            for _ in range(20):
                busy = (busy @ busy).div_(busy.max())
            assert {tensor.device for tensor in batch.tensors()} == {device}
            sums.append([tensor.double().sum() for tensor in batch.tensors()])
            del batch  # the next copies may take its memory, but not before it was summed
    wanted = [[t.double().sum() for t in batch.tensors()] for _, batch in run(plan, 1, 0, 0)]
    assert [[float(s) for s in found] for found in sums] == [
        pytest.approx([float(s) for s in own], rel=1e-12) for own in wanted
    ]


def test_loaders_share_the_stream_that_copies_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was freed for one stream is not another's: each validation makes a loader."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", made.append)
    get_copy_stream.cache_clear()
    try:
        for number in (0, 1, 0, 1):
            assert not list(copy_ahead(iter([]), torch.device("cuda", number)))
        assert made == [torch.device("cuda", 0), torch.device("cuda", 1)]
    finally:
        get_copy_stream.cache_clear()
