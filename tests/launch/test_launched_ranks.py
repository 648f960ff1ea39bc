"""Ranks that `launch_local` starts: their exit codes, signals, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onellm_dist.common.logging import configure_logging
from onellm_dist.launch.local import launch_local


def write_rank(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "rank.py"
    path.write_text("import os, sys, time, signal\nrank = int(os.environ['RANK'])\n" + body)
    return [sys.executable, "-u", str(path)]


def test_every_rank_done_is_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        launch_local(write_rank(tmp_path, "print('hello from', rank)"), 2, tmp_path / "logs") == 0
    )
    assert "hello from 0" in capsys.readouterr().out
    assert "hello from 1" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_the_first_failing_rank_is_shown_and_the_rest_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging()
    monkeypatch.setattr("onellm_dist.launch.local.PATIENCE_S", 0.2)
    started = time.monotonic()
    body = (
        "if rank == 1:\n    print('disk on fire', file=sys.stderr)\n    sys.exit(1)\ntime.sleep(60)"
    )
    assert launch_local(write_rank(tmp_path, body), 3, tmp_path / "logs") == 1
    assert time.monotonic() - started < 20
    err = capsys.readouterr().err
    assert "rank 1 failed first (exit code 1)" in err
    assert "disk on fire" in err


def test_independent_ranks_go_on_after_one_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onellm_dist.launch.local.PATIENCE_S", 0.0)
    body = f"if rank == 1:\n    sys.exit(3)\ntime.sleep(1)\nopen({str(tmp_path / 'x')!r}, 'w')"
    assert launch_local(write_rank(tmp_path, body), 2, tmp_path / "logs", independent=True) == 3
    assert (tmp_path / "x").exists()


def test_exit_codes_pass_through(tmp_path: Path) -> None:
    assert launch_local(write_rank(tmp_path, "sys.exit(75)"), 2, tmp_path / "logs") == 75


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_signals_reach_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    body = (
        "def on(n, f):\n"
        "    open(f'got-{rank}', 'w').write(signal.Signals(n).name)\n    sys.exit(75)\n"
        "for n in (signal.SIGUSR1, signal.SIGHUP):\n    signal.signal(n, on)\n"
        "open(f'ready-{rank}', 'w')\ntime.sleep(60)\n"
    )
    launcher = start_launcher(tmp_path, write_rank(tmp_path, body))
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) == 75
    assert [(tmp_path / f"got-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
def test_ranks_end_with_a_killed_launcher(tmp_path: Path) -> None:
    body = (
        "from onellm_dist.launch.local import end_with_parent\nend_with_parent()\n"
        "open(f'pid-{rank}', 'w').write(str(os.getpid()) + '\\n')\ntime.sleep(60)\n"
    )
    launcher = start_launcher(tmp_path, write_rank(tmp_path, body))
    pids = [wait_for_pid(tmp_path / f"pid-{rank}") for rank in (0, 1)]
    launcher.kill()
    launcher.wait(timeout=60)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)


def start_launcher(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    """`launch_local` of two ranks in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from onellm_dist.launch.local import launch_local\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}sys.exit(launch_local({command!r}, 2, Path('logs')))"],
        cwd=folder,
    )


def wait_for_pid(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def is_running(pid: int) -> bool:
    """Whether the process runs; an orphan that nobody has reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX" and os.path.exists(f"/proc/{pid}")
