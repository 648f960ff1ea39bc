"""Samples with any number of media in loader workers: what is read never depends on them."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_worlds import open_plan, write
from killed_streams import KilledStream
from media_worlds import write_media, write_wide

from onellm_dist.common.errors import OneLLMError
from onellm_dist.data.loader import Loader
from onellm_dist.data.plan import Plan
from onellm_dist.packed import PackedBatch
from onellm_dist.shards.tools.index_existing import index_existing_shards

MIXTURE = {"many": 3.0, "wide": 1.0, "pic": 1.0}
STEPS = 4
KILLED_STEPS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Placed media, pictures of several spans, and one picture a sample."""
    root = tmp_path_factory.mktemp("loader")
    write_media(root, "many", 30)
    write_wide(root, "wide", [(200, 200), (448, 224), (500, 500)] * 2)
    write(root, "pic", ["image"], 9)
    for name in ("wide", "pic"):
        index_existing_shards(root / name, media=True)
    return root


def open_here(root: Path, **keys: Any) -> Plan:
    fixed: dict[str, Any] = {
        "text_format": "caption",
        "global_batch": 10,
        "spans": {"image": 5},
        "pack_llm_tokens": 640,
        "pack_encoder_tokens": 8192,
    }
    return open_plan(root, MIXTURE, **{**fixed, **keys})


def digest(batch: PackedBatch) -> str:
    """SHA-256 of everything that the model gets."""
    found = hashlib.sha256()
    for name, value in sorted(batch.values.items()):
        found.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    for tensor in (batch.input_ids, batch.labels, batch.weights):
        found.update(tensor.numpy().tobytes())
    rest = (batch.text_token_counts, batch.modalities, batch.places, batch.span_numbers)
    found.update(repr((rest, batch.sample_ids, sorted(batch.skipped_samples))).encode())
    return found.hexdigest()


def test_a_modality_that_returns_too_many_values_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its last value would become that of the next sample."""
    modality = type(open_here(root).corpus.modalities["image"])
    read = modality.read_spans

    def read_one_more(self: Any, *values: Any, **keys: Any) -> list[torch.Tensor]:
        found = read(self, *values, **keys)
        return [*found, found[0]]

    monkeypatch.setattr(modality, "read_spans", read_one_more)
    with (
        Loader(open_here(root), 1, 0, 0, STEPS, 0) as loader,
        pytest.raises(
            OneLLMError, match=r"sample wide/\S+: modality image returned \d+ values for \d+ spans"
        ),
    ):
        list(loader)


@pytest.mark.slow
def test_batches_are_the_same_with_0_1_and_3_workers(root: Path) -> None:
    expected: dict[int, list[tuple[int, int, str]]] = {}
    seen: set[str] = set()
    for workers in (0, 1, 3):
        plan = open_here(root, workers=workers)
        for rank in range(2):
            with Loader(plan, 2, rank, 0, STEPS, workers) as loader:
                batches = list(loader)
            found = [(micro.step, micro.index, digest(batch)) for micro, batch in batches]
            assert expected.setdefault(rank, found) == found, (workers, rank)
            for _, batch in batches:
                seen.update(
                    kind
                    for kind, there in (
                        ("places", batch.places),
                        ("several media", any(len(set(m)) < len(m) for m in batch.modalities)),
                        ("several spans", batch.span_numbers),
                        ("no medium", () in batch.modalities),
                    )
                    if there
                )
                assert not batch.skipped_samples
    assert seen == {"places", "several media", "several spans", "no medium"}
    assert len({line for found in expected.values() for line in found}) > STEPS


def describe(batch: PackedBatch) -> list[str]:
    """A line for each sample: its id, and the SHA-256 of all that the model gets of it."""
    used: Counter[str] = Counter()
    ids, labels = (t.split(batch.text_token_counts) for t in (batch.input_ids, batch.labels))
    lines = []
    for i, name in enumerate(batch.sample_ids):
        spans = batch.modalities[i]
        places = batch.places[i] if batch.places else (1,) * len(spans)
        numbers = batch.span_numbers[i] if batch.span_numbers else (0,) * len(spans)
        found = hashlib.sha256(repr((spans, places, numbers, batch.weights[i].item())).encode())
        for tensor in (ids[i], labels[i]):
            found.update(tensor.numpy().tobytes())
        for span in spans:
            found.update(batch.values[span][used[span]].numpy().tobytes())
            used[span] += 1
        lines.append(f"{name} {found.hexdigest()}")
    return lines


def read_steps(root: Path, world_size: int, workers: int, count: int = STEPS) -> list[list[str]]:
    """The lines of all samples of each step, read by all ranks one after another."""
    steps: list[list[str]] = [[] for _ in range(count)]
    plan = open_here(root, workers=workers)
    for rank in range(world_size):
        with Loader(plan, world_size, rank, 0, count, workers) as loader:
            for micro, batch in loader:
                steps[micro.step] += describe(batch)
    return [sorted(lines) for lines in steps]


PAIRS = [(world_size, workers) for world_size in (1, 2, 3, 4, 8) for workers in (0, 1, 3)][1:]
SOME = [(2, 3), (3, 1), (4, 0), (8, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "pairs",
    [SOME, pytest.param([p for p in PAIRS if p not in SOME], marks=pytest.mark.soak)],
    ids=["some pairs", "the others"],
)
def test_one_stream_for_any_number_of_ranks_and_workers(
    root: Path, pairs: list[tuple[int, int]]
) -> None:
    """Texts, places, numbers and values of every sample, however the samples are packed."""
    expected = read_steps(root, 1, 0)
    assert [len(lines) for lines in expected] == [10] * STEPS
    for world_size, workers in pairs:
        assert read_steps(root, world_size, workers) == expected, (world_size, workers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 3), *(pytest.param(s, 12, marks=pytest.mark.soak) for s in (1, 2, 3))]
)
def test_kills_at_random_and_other_numbers_of_ranks_leave_one_stream(
    root: Path, tmp_path: Path, seed: int, kills: int
) -> None:
    world_sizes, workers = (1, 2, 3, 4, 8), (0, 1, 3)
    stream = KilledStream(lambda: open_here(root), describe, KILLED_STEPS, world_sizes, workers)
    found, killed = stream.read(tmp_path, seed, kills)
    assert killed == kills
    assert sorted(found) == list(range(KILLED_STEPS))
    expected = read_steps(root, 1, 0, KILLED_STEPS)
    assert [found[step] for step in range(KILLED_STEPS)] == expected


def test_tiles_are_balanced_over_sixteen_ranks(root: Path) -> None:
    plan = open_here(root, global_batch=5120, pack_llm_tokens=2048, pack_encoder_tokens=16384)
    assert plan.step(0, 16).balance <= 1.05
