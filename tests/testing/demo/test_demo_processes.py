"""Lanes of child processes: order, progress, failure, and a kill that leaves nothing behind."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import psutil
import pytest

from onellm_dist.common.errors import OneLLMError
from onellm_dist.testing.demo.journal import open_journal
from onellm_dist.testing.demo.processes import DemoProcess, kill_tree, run_lanes
from onellm_dist.testing.demo.timetable import DemoStage, Timetable, measure_slowdown


def make_process(tmp_path: Path, name: str, code: str, **options: float) -> DemoProcess:
    return DemoProcess(
        name,
        [sys.executable, "-u", "-c", code],
        tmp_path / f"{name}.log",
        kill_at=options.get("kill_at"),
    )


def test_lanes_run_side_by_side_and_processes_of_a_lane_in_order(tmp_path: Path) -> None:
    mark = (
        "import time, pathlib; pathlib.Path(r'{}').write_text(str(time.monotonic()));time.sleep({})"
    )
    files = [tmp_path / n for n in ("a", "b", "c")]
    a, b, c = (
        make_process(tmp_path, f.name, mark.format(f, s))
        for f, s in zip(files, (0.4, 0.0, 0.0), strict=True)
    )
    seen: set[tuple[str, ...]] = set()
    run_lanes([[a, b], [c]], lambda running: seen.add(tuple(sorted(j.name for j in running))))
    first, second, beside = (float(f.read_text()) for f in files)
    assert second >= first + 0.4 and beside < second
    assert ("a", "c") in seen or ("a",) in seen


def test_progress_is_the_last_count_of_this_start(tmp_path: Path) -> None:
    job = make_process(tmp_path, "count", "print('30/40 steps'); import time; time.sleep(30)")
    job.log.write_text("40/40 steps\n")
    job.start()
    assert job.process is not None
    deadline = time.monotonic() + 20
    while job.read_progress() != 0.75:
        assert time.monotonic() < deadline
        assert job.read_progress() in (0.0, 0.75)
        time.sleep(0.05)
    assert kill_tree(job.process.pid) == 1


def test_a_failure_shows_the_output_and_stops_the_others(tmp_path: Path) -> None:
    bad = make_process(tmp_path, "bad", "print('the disk is full'); raise SystemExit(3)")
    long = make_process(tmp_path, "long", "import time; time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(OneLLMError, match=r"bad failed \(exit code 3\)[\s\S]*the disk is full"):
        run_lanes([[bad], [long]], lambda running: None)
    assert (
        long.process is not None and long.process.poll() is not None
    )  # its code may have gone to whoever waited for it first
    assert time.monotonic() - started < 50


def test_the_kill_includes_grandchildren(tmp_path: Path) -> None:
    start = (
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'],"
        " start_new_session=True); "
    )
    grandchild = f"import subprocess, sys, time; {start}"
    code = (
        grandchild
        + "print(p.pid); [(print(f'{i}/100 steps'), time.sleep(0.05)) for i in range(100)]"
    )
    job = make_process(tmp_path, "family", code, kill_at=0.1)
    run_lanes([[job]], lambda running: None)
    assert job.killed
    text = job.log.read_text()
    pid = int(next(line for line in text.splitlines() if line.isdigit()))
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert "99/100 steps" not in text


def test_the_time_left_follows_what_was_measured(tmp_path: Path) -> None:
    out = io.StringIO()
    table = Timetable(
        [DemoStage("a", 100.0), DemoStage("b", 50.0), DemoStage("c", 50.0)],
        open_journal(tmp_path, full=False),
        out,
    )
    table.start_stage()
    assert table.estimate_left(0.0, 0.0) == (100.0, 200.0)
    here, everything = table.estimate_left(
        0.5, 100.0
    )  # twice as slow as predicted: 50 by the plan, 100 by the rate
    assert here == pytest.approx(75.0) and everything == pytest.approx(175.0)
    table.finish_stage()
    table.stages[0].taken = 200.0
    table.start_stage()
    assert table.estimate_left(0.0, 0.0) == (100.0, 200.0)  # the rest is stretched by two
    assert "[1/3] a" in out.getvalue() and "[2/3] b" in out.getvalue()


def test_an_interrupted_demo_resumes_with_its_unfinished_stage(tmp_path: Path) -> None:
    out = io.StringIO()
    first = Timetable(
        [DemoStage("a", 100.0), DemoStage("b", 50.0)], open_journal(tmp_path, full=True), out
    )
    assert first.start_stage()
    first.finish_stage()
    assert first.start_stage()  # and here it is interrupted
    again = Timetable(
        [DemoStage("a", 100.0), DemoStage("b", 50.0)], open_journal(tmp_path, full=True), out
    )
    again.show()
    assert not again.start_stage() and again.start_stage()
    assert again.taken == first.taken
    assert re.search(r"a +done\n +b +about 50 s\n +all +about 50 s", out.getvalue())


@pytest.mark.seconds
def test_the_slowdown_is_a_positive_ratio() -> None:
    assert 0.05 < measure_slowdown() < 200
