"""What a build leaves: whole datasets or nothing, and the same bytes from any number of workers."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from folder_builds import FINE, build
from shard_worlds import all_bytes, contents, picture, write_tree

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.task import TooManyFailuresError
from onellm_dist.shards.format.dataset import open_dataset


def test_output_is_not_overwritten_unless_asked_for(tmp_path: Path) -> None:
    build(tmp_path, FINE)
    before = all_bytes(tmp_path / "out")
    with pytest.raises(UsageError, match="already holds a dataset"):
        build(tmp_path, {"b.jpg": picture(1), "b.txt": "y"})
    assert all_bytes(tmp_path / "out") == before
    _, dataset = build(tmp_path, {}, overwrite=True)
    assert list(contents(dataset)) == ["a", "b"]
    with pytest.raises(TooManyFailuresError):
        build(tmp_path, {"b.jpg": b"broken"}, overwrite=True)
    assert list(contents(open_dataset(tmp_path / "out"))) == ["a", "b"]


def test_a_folder_of_datasets_is_named_as_such_and_replaced_if_asked_for(tmp_path: Path) -> None:
    out, counts = tmp_path / "toy", {"modalities": "image,audio", "train": "2", "test": "1"}
    build_dataset("toyworld", None, out, options=counts)
    before = all_bytes(out)
    with pytest.raises(UsageError, match=r"already holds datasets \(audio, .*(.|\n)*--overwrite"):
        build_dataset("toyworld", None, out, options=counts)
    assert all_bytes(out) == before
    build_dataset("toyworld", None, out, options=counts, seed=1, overwrite=True)
    assert all_bytes(out).keys() == before.keys()
    assert all_bytes(out) != before


def test_foreign_folders_are_refused_even_with_overwrite(tmp_path: Path) -> None:
    write_tree(tmp_path / "out", {"thesis.tex": "years of work"})
    with pytest.raises(UsageError, match="not empty"):
        build(tmp_path, FINE, overwrite=True)
    assert all_bytes(tmp_path / "out") == {"thesis.tex": b"years of work"}
    write_tree(tmp_path / "holder", {"manifest.json": "{}", "thesis.tex": "more"})
    with pytest.raises(UsageError):
        build_dataset("folder", tmp_path / "in", tmp_path / "holder", overwrite=True)
    assert set(all_bytes(tmp_path / "holder")) == {"manifest.json", "thesis.tex"}


def test_what_a_builder_that_was_killed_while_it_planned_left_is_cleared(tmp_path: Path) -> None:
    write_tree(
        tmp_path / ".out.building", {"built/train-000000.tar": b"half", "input_splits.jsonl": b""}
    )
    _, dataset = build(tmp_path, FINE)
    assert list(contents(dataset)) == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_builder_killed_between_its_last_renames_loses_nothing(tmp_path: Path) -> None:
    build(tmp_path, FINE)
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(UsageError, match="already holds a dataset"):
        build(tmp_path, FINE)
    assert list(contents(open_dataset(tmp_path / "out"))) == ["a"]


def test_two_builders_of_one_output(tmp_path: Path) -> None:
    (tmp_path / ".out.building").mkdir()
    other = os.open(tmp_path / ".out.building", os.O_RDONLY)
    fcntl.flock(
        other, fcntl.LOCK_EX
    )  # as a source that builds by itself does; planned builds of one request share the work
    with pytest.raises(UsageError, match="being built by another process"):
        build(tmp_path, FINE)
    os.close(other)
    build(tmp_path, FINE)


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onellm_dist.shards.build.task._TaskWriter.add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, FINE)
    assert os.listdir(tmp_path) == ["in"]


def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onellm_dist.shards.format.tar_writer.os.fsync", full)
    with pytest.raises(
        OneLLMError, match=r"No space left on device(.|\n)*nothing is kept at"
    ) as caught:
        build(tmp_path, FINE)
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        f"{i:03d}{e}": d
        for i in range(60)
        for e, d in ((".jpg", picture(i)), (".txt", f"caption {i}"))
    }
    write_tree(tmp_path / "in", {**files, "017.jpg": b"broken", "033.txt": b"\xff"})
    for workers in (1, 2):
        build_dataset(
            "folder",
            tmp_path / "in",
            tmp_path / str(workers),
            options={"name": "same", "max_samples": 20},
            workers=workers,
        )
    assert all_bytes(tmp_path / "1") == all_bytes(tmp_path / "2")
    assert open_dataset(tmp_path / "1").samples() == 58


def _abort(_: object) -> None:
    os.abort()


@pytest.mark.slow
def test_a_worker_that_dies_stops_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onellm_dist.shards.build.workers._start_worker", _abort)
    files: dict[str, bytes | str] = {f"{i}.jpg": picture(i) for i in range(4)}
    files |= {f"{i}.txt": "x" for i in range(4)}  # as many shards as 2 workers build apart
    with pytest.raises(OneLLMError, match="a worker process of the builder died"):
        build(tmp_path, files, workers=2, max_samples=1)
    assert os.listdir(tmp_path) == ["in"]
