"""`exit.json` belongs to the start that runs: who may write it, replace it and remove it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onellm_dist.common.errors import OneLLMError, RunInUseError, UsageError
from onellm_dist.common.refusals import (
    START_VARIABLE,
    describe_start,
    find_refusal,
    read_refusals,
)
from onellm_dist.common.run_files import CONFIG, EXIT, REFUSALS
from onellm_dist.train.records.exit_file import ExitFile

EARLIER = {"status": "preempted", "reason": "SIGTERM"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that an earlier start has left."""
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / EXIT).write_text(json.dumps(EARLIER))
    return tmp_path


def read(run_dir: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run_dir / EXIT).read_text())
    return found


def ranks(run_dir: Path, *, holds: bool = True, begun: bool = False) -> list[ExitFile]:
    """The exit files of the ranks of one start."""
    files = [ExitFile(run_dir, rank=rank, start="host:1") for rank in range(3)]
    earlier = files[0].find_earlier()
    for file in files if holds else ():
        file.hold(earlier)
    if begun:
        files[0].remove_earlier()
        for file in files:
            file.begin()
    return files


@pytest.mark.parametrize("error", [UsageError("no model"), RunInUseError("in use")])
@pytest.mark.parametrize("holds", [True, False])
def test_a_refusal_is_one_line_and_nothing_else(
    run_dir: Path, error: OneLLMError, *, holds: bool
) -> None:
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    files = ranks(run_dir, holds=holds)
    for file in (*files, files[0]):
        assert file.write_failure(error) == error.exit_code
    (line,) = read_refusals(run_dir)
    assert (line["reason"], line["exit_code"]) == (error.what, error.exit_code)
    after = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1


def test_a_failure_of_the_start_that_holds_the_run_replaces_the_earlier_file_once(
    run_dir: Path,
) -> None:
    files = ranks(run_dir)
    files[2].write_failure(MemoryError("no room"))
    files[0].write_failure(ConnectionError("closed by peer"))
    assert (read(run_dir)["reason"], read(run_dir)["rank"]) == ("MemoryError: no room", 2)
    assert read_refusals(run_dir) == []
    files[0].remove_earlier()
    assert read(run_dir)["rank"] == 2, "what a rank of this start wrote stays"


def test_a_rank_that_fails_because_another_was_refused_records_nothing(run_dir: Path) -> None:
    files = ranks(run_dir)
    files[2].write_failure(UsageError("no such folder on this node"))
    files[0].write_failure(ConnectionError("closed by peer"))
    assert read(run_dir) == EARLIER
    assert [line["rank"] for line in read_refusals(run_dir)] == [2]


def test_a_start_that_does_not_hold_the_run_cannot_touch_the_file(run_dir: Path) -> None:
    outside = ranks(run_dir, holds=False)
    outside[1].write_failure(ImportError("no module"))
    assert read(run_dir) == EARLIER


def test_after_the_begin_wrong_usage_is_an_end_like_others(run_dir: Path) -> None:
    files = ranks(run_dir, begun=True)
    assert not (run_dir / EXIT).exists()
    files[1].write_failure(UsageError("too long"))
    assert read(run_dir)["status"] == "usage" and read_refusals(run_dir) == []


def test_in_a_directory_without_a_run_a_refusal_has_an_exit_file_until_a_start_begins(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "fresh"
    for _ in range(2):
        ExitFile(folder, rank=0).write_failure(UsageError("no model"))
    assert read(folder)["status"] == "usage" and len(read_refusals(folder)) == 2
    ExitFile(folder, rank=0).write_failure(RunInUseError("in use"))
    assert read(folder)["status"] == "usage", "it may be that of the start in use"
    ranks(folder, begun=True)
    assert not (folder / EXIT).exists()


def test_a_failure_replaces_the_file_of_another_start_that_was_refused_meanwhile(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "fresh"
    folder.mkdir()
    first = ranks(folder)
    ExitFile(folder, rank=0, start="other:2").write_failure(UsageError("no model"))
    assert read(folder)["status"] == "usage"
    first[1].write_failure(MemoryError("no room"))
    assert read(folder)["status"] == "failed"
    ExitFile(folder, rank=0, start="third:3").write_failure(UsageError("no model"))
    assert read(folder)["status"] == "failed", "it stays"
    assert {path.name for path in folder.iterdir()} == {EXIT, REFUSALS}


def test_a_job_finds_its_own_refusal(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    since, meets = "2020-01-01T00:00:00+0000", "node1:12345"
    for job, start, reason, found_reason in (
        ("7", "node1:1", "first", "first"),
        ("8", "node2:1", "of another job", "first"),
        ("", "login:29500", "by hand, in the same directory", "first"),
        ("", meets, "through ssh", "through ssh"),
    ):
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        else:
            monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        ExitFile(run_dir, rank=0, start=start).write_failure(UsageError(reason))
        found = find_refusal(run_dir, "7.2", start=meets, since=since)
        assert found is not None and found["reason"] == found_reason
    late = "2999-01-01T00:00:00+0000"
    found = find_refusal(run_dir, "7.2", start=meets, since=late)
    assert found is not None and found["reason"] == "first"
    assert find_refusal(run_dir, "7.3", start=meets, since=late) is None


def test_a_start_has_one_name_that_no_other_start_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_start("node1", 12345, {}) == "node1:12345"
    assert describe_start("127.0.0.1", 29500, {START_VARIABLE: "abc"}) == "abc"
    here = describe_start("127.0.0.1", 29500, {})
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert describe_start("127.0.0.1", 29500, {}) != here
