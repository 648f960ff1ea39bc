"""The files of `model.path` before a run reads them: read once per node, damage is found."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from one_rank import ONE_RANK
from test_checkpoint_integrity import config

from onellm_dist.common import checksums
from onellm_dist.common.checksums import SUMS, write_sums
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import sha256_file
from onellm_dist.train import setup
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.checkpoint.source import check_source, describe_source
from onellm_dist.train.checkpoint.weights import check_weights, hash_on_node

FILES = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(name * 20)
    (folder / "config.json").write_text('{"model_type": "onellm"}')
    (folder / "tokenizer.json").write_text("{}")
    write_sums(folder)
    return folder


class Ranks:
    """Ranks that are threads: `gather` is that of `Distributed`."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=20)
        self._box: list[Any] = [None] * world_size

    def run(self, function: Any) -> list[Any]:
        """What `function(dist)` returns or raises on each rank."""
        found: list[Any] = [None] * len(self._box)

        def run_rank(rank: int) -> None:
            dist = SimpleNamespace(
                rank=rank,
                world_size=len(found),
                is_rank_zero=rank == 0,
                gather=lambda value: self._gather(rank, value),
            )
            try:
                found[rank] = function(dist)
            except Exception as error:
                found[rank] = error

        threads = [
            threading.Thread(target=run_rank, args=(r,), name=f"rank-{r}")
            for r in range(len(found))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._box[rank] = value
        self._barrier.wait()
        found = list(self._box)
        self._barrier.wait()
        return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(rank, file) of every file that is hashed."""
    found: list[tuple[str, str]] = []

    def read(path: Path) -> str:
        found.append((threading.current_thread().name, path.name))
        return sha256_file(path)

    monkeypatch.setattr("onellm_dist.common.checksums.sha256_file", read)
    return found


def test_a_flipped_bit_stops_a_start(folder: Path, tmp_path: Path) -> None:
    session: Any = SimpleNamespace(
        dist=ONE_RANK, timing=SimpleNamespace(measure=lambda name: nullcontext())
    )
    rng = random.Random(0)
    for number in range(100):
        path = folder / [*FILES, "config.json"][number % 4]
        before = path.read_bytes()
        data = bytearray(before)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UsageError, match=f"{path.name} is damaged or was changed"):
            setup.open_inputs(
                config(tmp_path, path=str(folder)),
                target=ResumeTarget(None),
                session=session,
            )
        path.write_bytes(before)
    check_weights(folder, ONE_RANK)
    (folder / SUMS).write_text("nothing\n")
    with pytest.raises(UsageError, match=f"{SUMS} cannot be read"):
        check_weights(folder, ONE_RANK)
    (folder / SUMS).unlink()
    check_weights(folder, ONE_RANK)


def test_a_node_reads_each_file_once_and_all_ranks_refuse(
    folder: Path, reads: list[tuple[str, str]]
) -> None:
    assert Ranks(2).run(lambda dist: check_weights(folder, dist)) == [None, None]
    assert sorted(name for _, name in reads) == ["config.json", *FILES]
    assert len({rank for rank, _ in reads}) == 2
    (folder / FILES[1]).write_text("other")
    first, second = Ranks(2).run(lambda dist: check_weights(folder, dist))
    assert all(isinstance(error, UsageError) for error in (first, second))
    assert FILES[1] in first.what and FILES[1] in second.what


def test_every_node_reads_its_own_copy(
    folder: Path, reads: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        socket, "gethostname", lambda: f"node{int(threading.current_thread().name[-1]) // 2}"
    )
    Ranks(4).run(lambda dist: check_weights(folder, dist))
    for node in (("rank-0", "rank-1"), ("rank-2", "rank-3")):
        own = sorted(name for rank, name in reads if rank in node)
        assert own == ["config.json", *FILES]


def test_what_was_read_is_not_read_again(
    folder: Path,
    tmp_path: Path,
    reads: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resume compares the same files with the manifest; checkpoints record them."""
    monkeypatch.setattr(checksums, "STABLE_AGE_NS", -1)
    own = config(tmp_path, path=str(folder))
    check_weights(folder, ONE_RANK)
    assert len(reads) == 4
    manifest = {"frozen": describe_source(own)}
    check_source(tmp_path, manifest, own, ONE_RANK)
    check_weights(folder, ONE_RANK)
    assert len(reads) == 4
    (folder / FILES[0]).write_text("other")
    with pytest.raises(UsageError, match=rf"{FILES[0]} has sha256"):
        check_source(tmp_path, manifest, own, ONE_RANK)


def test_a_file_that_cannot_be_read_is_named_on_every_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("onellm_dist.common.checksums.sha256_file", fail)
    found = Ranks(2).run(lambda dist: check_weights(folder, dist))
    assert all(isinstance(e, OneLLMError) and "Input/output error" in e.what for e in found)
    digests = hash_on_node([folder / FILES[0]], ONE_RANK)
    assert "cannot be read" in digests[folder / FILES[0]]
