"""Builds that are killed, stopped or shared end in the same bytes as an undisturbed build."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shard_kills import make_killable
from shard_rows import ROWS, build, register_rows, write_rows
from shard_worlds import all_bytes, picture, write_tree

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards import build_dataset, open_dataset
from onellm_dist.shards.build import registry
from onellm_dist.shards.build.workers import ArrayTask
from onellm_dist.shards.sources.base import RawSample, SplitDescription


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    register_rows(monkeypatch)


def run_killed(inputs: Path, out: Path, at: int) -> tuple[int, int]:
    """Build in a process that is killed at an operation (0: never); (exit code, operations)."""
    process, counter = make_killable(out, at, partial(build, inputs, out))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, counter.value


def _killed_at_random(tmp_path: Path, seeds: range) -> None:
    inputs = write_rows(tmp_path / "in")
    _, operations = run_killed(inputs, tmp_path / "undisturbed", 0)
    expected = all_bytes(tmp_path / "undisturbed")
    assert operations > 100
    kept = 0
    for seed in seeds:
        draw, out = random.Random(seed), tmp_path / f"out{seed}"
        for _ in range(3):
            code, _ = run_killed(inputs, out, draw.randint(1, operations))
            kept += len(list((tmp_path / f".{out.name}.building").glob("done/*.json")))
            assert code in (0, -signal.SIGKILL) or out.exists()
            if out.exists():
                break
        if not out.exists():
            assert run_killed(inputs, out, 0)[0] == 0
        assert all_bytes(out) == expected
        if (
            tmp_path / f".{out.name}.building"
        ).exists():  # killed between the last rename and the removal of the build's folder
            assert not list((tmp_path / f".{out.name}.building").glob("dataset"))
    assert kept  # some kills came after shards were done, and those builds were resumed


@pytest.mark.seconds
def test_a_build_killed_at_any_file_operation_ends_in_the_same_bytes(tmp_path: Path) -> None:
    _killed_at_random(tmp_path, range(5))


@pytest.mark.soak
def test_a_build_killed_at_any_file_operation_ends_in_the_same_bytes_for_long(
    tmp_path: Path,
) -> None:
    _killed_at_random(tmp_path, range(5, 25))


@pytest.mark.seconds
def test_only_missing_shards_are_built_again(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path / "in")
    _, operations = run_killed(inputs, tmp_path / "a", 0)
    run_killed(inputs, tmp_path / "b", operations // 2)
    built = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".b.building/built").glob("*.tar")}
    assert 0 < len(built) < 8
    os.link(tmp_path / ".b.building/built" / min(built), tmp_path / "link")
    build(inputs, tmp_path / "b")
    assert (tmp_path / "link").stat().st_nlink == 2  # moved, not written again
    assert all_bytes(tmp_path / "a") == all_bytes(tmp_path / "b")


def _one_of_several_killed(tmp_path: Path, seeds: range) -> None:
    """Three processes that make the same call (srun's ranks) share the work; some are killed."""
    inputs = write_rows(tmp_path / "in")
    _, operations = run_killed(inputs, tmp_path / "alone", 0)
    expected = all_bytes(tmp_path / "alone")
    for seed in seeds:
        draw, out = random.Random(seed), tmp_path / f"out{seed}"
        kills = [draw.randint(1, operations // 2) if rank <= seed % 3 else 0 for rank in range(3)]
        draw.shuffle(kills)
        processes = [make_killable(out, at, partial(build, inputs, out))[0] for at in kills]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        codes = [process.exitcode for process in processes]
        assert all(
            code == 0 or (code == -signal.SIGKILL and at)
            for code, at in zip(codes, kills, strict=True)
        )
        if not out.exists():  # the one that died held the last shard, or the others had left before
            build(inputs, out)
        assert all_bytes(out) == expected


@pytest.mark.seconds
def test_processes_with_the_same_call_share_the_work_and_some_may_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "SLURM_STEP_NUM_TASKS", "3"
    )  # as srun sets it: a process that starts when the others have finished does not fail
    _one_of_several_killed(tmp_path, range(5))


@pytest.mark.soak
def test_processes_with_the_same_call_share_the_work_and_some_may_die_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    _one_of_several_killed(tmp_path, range(5, 25))


def test_a_late_rank_of_srun_finds_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_rows(tmp_path / "in")
    build(inputs, tmp_path / "out")
    with pytest.raises(UsageError, match="already holds a dataset"):
        build(inputs, tmp_path / "out")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    assert build(inputs, tmp_path / "out").notes == ("the other processes had already finished",)


@pytest.mark.seconds
def test_each_task_of_an_array_builds_its_shards(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path / "in")
    build(inputs, tmp_path / "alone")
    first = build(inputs, tmp_path / "out", task=ArrayTask(1, 3))
    assert "put together by the process that ends last" in first.notes[0]
    assert not (tmp_path / "out").exists()
    assert sorted(p.stem for p in (tmp_path / ".out.building/done").glob("*.json")) == [
        "000001",
        "000004",
        "000007",
    ]
    build(inputs, tmp_path / "out", task=ArrayTask(0, 3))
    assert build(inputs, tmp_path / "out", task=ArrayTask(2, 3)).samples == 56
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "alone")
    assert "had already finished" in build(inputs, tmp_path / "out", task=ArrayTask(1, 3)).notes[0]
    with pytest.raises(UsageError, match="INDEX/COUNT"):
        ArrayTask.parse("3/3")


def test_another_request_does_not_resume_an_unfinished_build(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path / "in")
    build(inputs, tmp_path / "out", task=ArrayTask(0, 2))
    with pytest.raises(UsageError, match="max_samples: 8 then, 9 now"):
        build(inputs, tmp_path / "out", max_samples=9)
    report = build(inputs, tmp_path / "out", max_samples=9, overwrite=True)
    assert report.samples == 56
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_an_input_that_changed_under_the_builder_is_an_error(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path / "in")
    build(inputs, tmp_path / "out", task=ArrayTask(0, 2))
    (inputs / "rows.txt").write_text("a:b\n")
    with pytest.raises(
        OneLLMError, match=r"rows:\d+: it has \d samples?; when the build was planned it had 10"
    ):
        build(inputs, tmp_path / "out")


@pytest.mark.parametrize("grown", [0, 20])
@pytest.mark.parametrize("limit", [None, 25])
def test_an_input_that_grew_is_detected_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, grown: int
) -> None:
    inputs = write_rows(tmp_path / "in")
    listed = ROWS.raw_samples
    assert listed is not None

    def longer(inputs: Path, description: SplitDescription, **options: Any) -> Iterator[RawSample]:
        yield from listed(inputs, description, **options)
        if description["first"] == grown:
            yield RawSample(f"one more in {grown}", "rows.txt", caption="more")

    build(inputs, tmp_path / "out", limit=limit, task=ArrayTask(2, 9))
    monkeypatch.setattr(
        registry, "all_sources", lambda: {"rows": replace(ROWS, raw_samples=longer)}
    )
    if limit is not None and grown == 20:  # of this input split only 5 samples were wanted
        assert build(inputs, tmp_path / "out", limit=limit).samples == 23
        return
    with pytest.raises(
        OneLLMError,
        match=rf"rows:{grown}: it has more samples; when the build was planned it had 10",
    ):
        build(inputs, tmp_path / "out", limit=limit)


@pytest.mark.slow
def test_worker_processes_write_the_same_bytes(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        f"{i:03d}{e}": d
        for i in range(40)
        for e, d in ((".jpg", picture(i)), (".txt", f"caption {i}"))
    }
    write_tree(tmp_path / "in", {**files, "017.jpg": b"broken", "033.jpg": picture(2)})
    options: dict[str, Any] = {"name": "same", "max_samples": 6, "dedup": "exact"}
    for workers in (1, 2):
        build_dataset(
            "folder", tmp_path / "in", tmp_path / str(workers), options=options, workers=workers
        )
    assert all_bytes(tmp_path / "1") == all_bytes(tmp_path / "2")
    assert open_dataset(tmp_path / "1").samples() == 38
