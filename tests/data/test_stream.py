"""The promise of the data plane: one digest for any number of ranks, workers, faults and kills.

Eight modalities are packed for 200 steps. Decoding is not tested here, so the modalities are tiny:
a value is four numbers drawn from the part's bytes and the sample's own generator. Everything else
is real: tars, indexes, plan, loader, worker processes, kills.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_worlds import open_plan
from killed_streams import KilledStream

from onellm_dist.common.errors import SampleError
from onellm_dist.data import plan as plan_module
from onellm_dist.data import retry
from onellm_dist.data.loader import Loader
from onellm_dist.data.plan import Plan
from onellm_dist.modalities import all_modalities
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.shards.format.dataset import Dataset, ShardInfo, open_dataset
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.format.writer import DatasetWriter

STEPS, BATCH = 200, 12
WORLD_SIZES, WORKERS = (1, 2, 3, 4, 5, 8), (0, 1, 3)
PAIRS = [(world_size, workers) for world_size in WORLD_SIZES for workers in WORKERS][1:]
"""All but one rank without workers, which the others are compared with."""
WEIGHTS = (0.38, 0.2, 0.14, 0.1, 0.08, 0.05, 0.03, 0.02)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def tiny_modalities() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    for kind in all_modalities().values():
        patch.setattr(type(kind), "decode", decode)
        patch.setattr(type(kind), "transform", transform)
        patch.setattr(type(kind), "value_shape", (4,))
    patch.setattr(retry, "PAUSES", (0.0, 0.0))
    patch.setattr(plan_module, "KEPT_STEPS", 8 * STEPS)
    yield
    patch.undo()


def decode(self: Modality, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> int:
    data = b"".join(parts[role].data for role in sorted(parts))
    if data.startswith(b"no media"):
        raise SampleError("no media", "a test.", "nothing.")
    return zlib.crc32(data)


def transform(self: Modality, raw: int, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
    return torch.tensor([raw % 1000 / 1000, *rng.uniform(size=3)], dtype=torch.float32)


def build(root: Path, *, broken: bool) -> Path:
    """One dataset per modality; if `broken`, one sample fails its CRC-32 and one is not media."""
    for number, (name, kind) in enumerate(all_modalities().items()):
        with DatasetWriter(root / name, name=name, modalities=(name,), max_samples=17) as writer:
            for sample in range(60 + 7 * number):
                content = (
                    b"no media"
                    if broken and (number, sample) == (1, 5)
                    else f"{name} {sample}".encode()
                )
                parts = {accepted[0]: content for accepted in kind.required_parts.values()}
                text = " ".join(["a red cube"] * (1 + (sample * 7 + number) % 9))
                writer.add("train", f"{name}-{sample:04d}", {**parts, "txt": text.encode()})
    if broken:
        dataset = open_dataset(root / "image")
        shard = dataset.shards()[1]
        place = dataset.index(shard).parts(8)["jpg"]
        with dataset.tar_path(shard).open("r+b") as file:
            file.seek(place.offset)
            file.write(b"\xff")
    return root


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sound"), broken=False)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("broken"), broken=True)


def plan_of(root: Path) -> Plan:
    mixture = dict(zip(all_modalities(), WEIGHTS, strict=True))
    budget = {"pack_llm_tokens": 512, "pack_encoder_tokens": 6000}
    return open_plan(
        root, mixture, modalities=tuple(all_modalities()), global_batch=BATCH, **budget
    )


class Stream:
    """What was read, by step: sample id to (weight, values, text)."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, tuple[float, tuple[float, ...], tuple[int, ...]]]] = {}
        self.skipped_samples: set[str] = set()

    def add(self, step: int, batch: Any) -> None:
        of_step = self.steps.setdefault(step, {})
        taken: Counter[str] = Counter()
        texts = batch.input_ids.split(list(batch.text_token_counts))
        for i, name in enumerate(batch.sample_ids):
            (kind,) = batch.modalities[i]
            assert name not in of_step, f"{name} twice in step {step}"
            of_step[name] = (
                batch.weights[i].item(),
                tuple(batch.values[kind][taken[kind]].tolist()),
                tuple(texts[i].tolist()),
            )
            taken[kind] += 1
        self.skipped_samples |= {batch.sample_ids[i] for i in batch.skipped_samples}

    def digest(self) -> str:
        lines = [
            f"{step} {name}\n" for step in sorted(self.steps) for name in sorted(self.steps[step])
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_all(plan: Plan, world_size: int, workers: int) -> Stream:
    stream = Stream()
    for rank in range(world_size):
        with Loader(plan, world_size, rank, 0, STEPS, workers) as loader:
            for micro, batch in loader:
                stream.add(micro.step, batch)
    return stream


def planned_digest(plan: Plan) -> str:
    lines = [
        f"{step} {name}\n"
        for step in range(STEPS)
        for name in sorted(plan.corpus.sample_ids(plan.samples(step)))
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def reads_fail_once(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str, int]]:
    """Every seventh read of every tar fails the first time in each process."""
    met: Counter[tuple[str, str, int]] = Counter()
    original = Dataset.read_tar

    def read_tar(self: Dataset, shard: ShardInfo, start: int, end: int) -> bytes:
        place = (self.name, shard.path, start)
        met[place] += 1
        if zlib.crc32(repr(place).encode()) % 7 == 0 and met[place] == 1:
            raise OSError(5, "Input/output error")
        return original(self, shard, start, end)

    monkeypatch.setattr(Dataset, "read_tar", read_tar)
    return met


@pytest.mark.parametrize(
    "pairs",
    [[(2, 3), (3, 0), (5, 1)], pytest.param(PAIRS, marks=pytest.mark.soak)],
    ids=["some pairs", "all pairs"],
)
def test_one_digest_for_any_number_of_ranks_and_workers(
    sound: Path, broken: Path, reads_fail_once: Counter[Any], pairs: list[tuple[int, int]]
) -> None:
    """With corrupt samples and reads that fail once: the same ids and skipped samples."""
    plan = plan_of(broken)
    expected = planned_digest(plan_of(sound))
    whole = read_all(plan, 1, 0)
    assert len(whole.steps) == STEPS
    assert sum(map(len, whole.steps.values())) == STEPS * BATCH
    assert whole.digest() == expected
    assert {name.split("@")[0] for name in whole.skipped_samples} == {
        "image/train-000001/image-0025",
        "video/train-000000/video-0005",
    }
    assert sum(count > 1 for count in reads_fail_once.values()) > 20, (
        "many reads failed, and none of them permanently"
    )
    for world_size, workers in pairs:
        stream = read_all(plan, world_size, workers)
        assert stream.digest() == expected, (world_size, workers)
        assert stream.steps == whole.steps, (world_size, workers)
        assert stream.skipped_samples == whole.skipped_samples


def test_the_undisturbed_stream_skips_no_sample(sound: Path, broken: Path) -> None:
    plan = plan_of(sound)
    stream, damaged = read_all(plan, 3, 1), read_all(plan_of(broken), 3, 0)
    assert stream.digest() == planned_digest(plan) == damaged.digest()
    assert stream.skipped_samples == set()
    differing = {
        n
        for step in stream.steps
        for n in stream.steps[step]
        if stream.steps[step][n] != damaged.steps[step][n]
    }
    assert differing == damaged.skipped_samples, "no other sample was touched"


def killed_stream(root: Path) -> KilledStream:
    return KilledStream(
        lambda: plan_of(root), lambda batch: list(batch.sample_ids), STEPS, WORLD_SIZES, WORKERS
    )


def digest_of(applied: Mapping[int, list[str]]) -> str:
    return hashlib.sha256(
        "".join(f"{step} {name}\n" for step in sorted(applied) for name in applied[step]).encode()
    ).hexdigest()


def test_five_kills_and_changes_of_ranks_leave_one_digest(sound: Path, tmp_path: Path) -> None:
    applied, kills = killed_stream(sound).read(tmp_path, seed=0, kills=5)
    assert kills == 5
    assert digest_of(applied) == planned_digest(plan_of(sound))


@pytest.mark.soak
def test_twenty_kills_and_changes_of_ranks_leave_one_digest(broken: Path, tmp_path: Path) -> None:
    for seed in range(1, 4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        applied, kills = killed_stream(broken).read(folder, seed=seed, kills=20)
        assert kills == 20
        assert digest_of(applied) == planned_digest(plan_of(broken))


def test_the_corrupt_sample_is_really_corrupt(broken: Path) -> None:
    dataset = open_dataset(broken / "image")
    with pytest.raises(SampleError, match="CRC-32"):
        read_parts(dataset, dataset.shards()[1], 8)
