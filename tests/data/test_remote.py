"""Datasets behind URLs: the same batches as from disk, read ahead by range, cached, repaired."""

from __future__ import annotations

import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from data_worlds import section, tokenizer, write
from stores import local_s3

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.data import retry
from onellm_dist.data.loader import Loader
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.packed import PackedBatch
from onellm_dist.shards import open_dataset
from onellm_dist.shards.storage.remote import RemoteFolder

MIXTURE = {"pic": 2.0, "imu": 1.0, "talk": 1.0}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    write(root, "pic", ["image"], 40, per_shard=20, broken=[3])
    write(root, "imu", ["imu"], 25)
    write(root, "talk", [], 11)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path / "user_cache"))
    monkeypatch.setattr(retry, "PAUSES", (0.01, 0.01))
    return tmp_path / "user_cache"


@pytest.fixture
def memory(local: Path) -> Iterator[str]:
    """The datasets in a bucket of fsspec's memory file system."""
    fs, bucket = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for path in local.rglob("*"):
        if path.is_file() and "token_counts" not in path.parts:
            fs.pipe_file(f"{bucket}/{path.relative_to(local)}", path.read_bytes())
    yield f"memory:/{bucket}"
    fs.rm(bucket, recursive=True)


def plan_of(root: Path | str, **keys: Any) -> Plan:
    return Plan.open(
        section(root, MIXTURE, **keys), tokenizer(), 0, ("image", "imu", "fmri"), show=False
    )


def batches_of(plan: Plan, *, workers: int = 0, steps: int = 3) -> list[PackedBatch]:
    with Loader(plan, 1, 0, 0, steps, workers) as loader:
        return [batch for _, batch in loader]


def assert_same(found: list[PackedBatch], expected: list[PackedBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.sample_ids, one.text_token_counts, list(one.skipped_samples)) == (
            other.sample_ids,
            other.text_token_counts,
            list(other.skipped_samples),
        )
        assert torch.equal(one.input_ids, other.input_ids)
        assert all(torch.equal(one.values[name], other.values[name]) for name in other.values)


class Requests:
    """Records the requests to the remote side, and lets some of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.failing: Counter[str] = Counter()
        original = RemoteFolder.read

        def read(folder: RemoteFolder, name: str, start: int, end: int) -> bytes:
            self.ranges.append((name, start, end))
            if self.failing[name] > 0:
                self.failing[name] -= 1
                raise OSError("the network is down")
            return original(folder, name, start, end)

        monkeypatch.setattr(RemoteFolder, "read", read)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.seconds
def test_the_stream_of_a_url_is_that_of_the_disk(
    local: Path, memory: str, tmp_path: Path, workers: int, cached: bool
) -> None:
    keys = {"cache_dir": tmp_path / "node"} if cached else {}
    plan, expected = plan_of(memory, workers=workers, **keys), plan_of(local)
    assert [plan.digest(step) for step in range(3)] == [expected.digest(step) for step in range(3)]
    assert plan.fingerprint() == expected.fingerprint()
    assert_same(batches_of(plan, workers=workers), batches_of(expected))
    assert not cached or any((tmp_path / "node" / "chunks").rglob("*"))


def test_a_dataset_may_have_its_own_url(local: Path, memory: str) -> None:
    mixed = section(local, {"pic": 1.0})
    mixed = mixed.model_validate(
        {**mixed.model_dump(), "mixture": [{"path": "pic"}, {"path": f"{memory}/imu"}]}
    )
    plan = Plan.open(mixed, tokenizer(), 0, ("image", "imu"), show=False)
    assert [dataset.remote is not None for dataset in plan.corpus.datasets] == [False, True]
    assert len(batches_of(plan, steps=1)[0].sample_ids) > 0


def test_manifest_and_indexes_are_copied_once(
    memory: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches_of(plan_of(memory))
    copies = sorted(path.name for path in (own_cache / "remote").rglob("*") if path.is_file())
    assert sum(name.endswith(".tar.index") for name in copies) == 2 + 4 + 2
    assert not any(name.endswith((".tar", ".staged")) for name in copies)
    fetched: list[str] = []
    monkeypatch.setattr(RemoteFolder, "fetch", lambda self, name, target: fetched.append(name))
    batches_of(plan_of(memory))
    assert fetched == []


def test_a_damaged_copy_of_an_index_is_fetched_again(memory: str, own_cache: Path) -> None:
    expected = [plan_of(memory).digest(step) for step in range(3)]
    for copy in (own_cache / "remote").rglob("*.tar.index"):
        data = bytearray(copy.read_bytes())
        data[-70] ^= 1
        copy.write_bytes(data)
    assert [plan_of(memory).digest(step) for step in range(3)] == expected


def test_neighbouring_ranges_are_read_together_and_ahead(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(memory, global_batch=40, pack_llm_tokens=8192, pack_encoder_tokens=40_000)
    requests = Requests(monkeypatch)
    batches = batches_of(plan, steps=1)
    samples = sum(len(batch.sample_ids) for batch in batches)
    assert samples == 40
    assert len(requests.ranges) <= 10, (
        "8 small shards: one request each, because their samples lie close together"
    )


def test_the_data_held_is_bounded(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from onellm_dist.data import read_ahead

    monkeypatch.setattr(read_ahead, "GAP", -1)  # one fetch per sample
    plan = plan_of(memory)
    reader, (first, *_) = Reader(plan.corpus), plan.step(0, 1).ranks[0]
    ahead = read_ahead.ReadAhead(None, limit=25_000)
    spans = reader._locate_all(first.samples, {})
    assert sum(span.end - span.start for span in spans) > 25_000
    ahead.request(spans)
    assert 0 < ahead._bytes <= 25_000
    found = [ahead.load(span) for span in spans]
    assert found[0] == spans[0].dataset.read_tar(spans[0].shard, spans[0].start, spans[0].end)
    assert found[-1] is None
    assert ahead._bytes == 0


def test_a_remote_read_that_fails_once_skips_no_sample(
    local: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, expected = plan_of(memory), batches_of(plan_of(local))
    requests = Requests(monkeypatch)
    requests.failing.update({shard.path: 2 for shards in plan.corpus.shards for shard in shards})
    assert_same(batches_of(plan), expected)
    assert (
        requests.failing["shards/train-000000.tar"]
        == requests.failing["shards/train-000001.tar"]
        == 0
    )


def test_a_read_that_always_fails_skips_the_sample_with_its_reason(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(memory)
    requests = Requests(monkeypatch)
    requests.failing["shards/train-000000.tar"] = 10**9
    reasons = [reason for batch in batches_of(plan) for reason in batch.skipped_samples.values()]
    assert reasons
    assert all("train-000000" in reason for reason in reasons)
    assert any("the network is down" in reason for reason in reasons)


def test_a_bad_chunk_in_the_cache_is_found_and_fetched_again(
    local: Path, memory: str, tmp_path: Path
) -> None:
    plan, expected = plan_of(memory, cache_dir=tmp_path / "node"), batches_of(plan_of(local))
    assert_same(batches_of(plan), expected)
    chunks = [path for path in (tmp_path / "node" / "chunks").rglob("*") if path.is_file()]
    assert chunks
    for number, path in enumerate(chunks):
        data = path.read_bytes()
        path.write_bytes(
            data[: len(data) // 2] if number % 2 else bytes(byte ^ 255 for byte in data)
        )
    assert_same(batches_of(plan), expected)
    assert_same(batches_of(plan), expected)


def test_a_warm_cache_reads_nothing_remote(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(memory, cache_dir=tmp_path / "node")
    batches_of(plan)
    requests = Requests(monkeypatch)
    batches_of(plan)
    assert requests.ranges == []


def test_token_counts_beside_the_remote_shards_are_used(
    local: Path, memory: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_of(local)  # writes the token counts
    fs = fsspec.filesystem("memory")
    for path in local.rglob("token_counts/*/*.npy"):
        fs.pipe_file(
            f"{memory.removeprefix('memory:/')}/{path.relative_to(local)}", path.read_bytes()
        )
    requests = Requests(monkeypatch)
    plan = Plan.open(
        section(memory, MIXTURE), tokenizer(), 0, ("image", "imu"), show=False, build_counts=False
    )
    assert plan.samples(0) == plan_of(local).samples(0)
    assert requests.ranges == []


def test_errors_of_opening_are_plain(memory: str) -> None:
    with pytest.raises(UsageError, match=r"nothing/manifest\.json cannot be read"):
        open_dataset(f"{memory}/nothing")
    with pytest.raises(UsageError, match="nonsense"):
        open_dataset("nonsense://bucket/pic")


def test_a_missing_shard_is_an_error_and_skips_no_sample(memory: str) -> None:
    plan = plan_of(memory)
    fsspec.filesystem("memory").rm(
        f"{memory.removeprefix('memory:/')}/talk/shards/train-000001.tar.index"
    )
    shutil.rmtree(plan.corpus.datasets[2].root / "shards")
    plan = plan_of(memory)
    with pytest.raises(OneLLMError, match=r"train-000001\.tar"):
        [plan.digest(step) for step in range(6)]


@pytest.fixture(scope="module")
def s3(local: Path) -> Iterator[str]:
    """The datasets in a bucket of a local S3 (moto's server)."""
    boto3 = pytest.importorskip("boto3")
    with local_s3("sets") as url:
        client = boto3.client("s3")
        for path in local.rglob("*"):
            if path.is_file() and "token_counts" not in path.parts:
                client.upload_file(str(path), "sets", f"all/{path.relative_to(local)}")
        yield f"{url}/all"


@pytest.mark.slow
def test_an_s3_bucket_gives_the_stream_of_the_disk(local: Path, s3: str, tmp_path: Path) -> None:
    """With and without a cache, in this process and in forked workers.

    Workers must not use the connections of their parent.
    """
    expected = batches_of(plan_of(local))
    assert_same(batches_of(plan_of(s3)), expected)
    assert_same(
        batches_of(plan_of(s3, workers=2, cache_dir=tmp_path / "node"), workers=2), expected
    )
    with pytest.raises(UsageError, match="cannot be read"):
        open_dataset(f"{s3}/nothing")
