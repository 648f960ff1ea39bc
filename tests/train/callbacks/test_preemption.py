"""Requests to stop a run, what ends it at once, and the grace period of a job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onellm_dist.common.run_files import EVENTS, STOP
from onellm_dist.train.callbacks.preemption import (
    COPY_SECONDS,
    GRACE_PERIOD,
    Preemption,
    grace_period_seconds,
    warn_about_grace_period,
)
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.exit_file import ExitFile

LISTENER = """
import os, sys, time
from pathlib import Path
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.callbacks.preemption import Preemption
folder = Path(sys.argv[1])
exit_file = ExitFile(folder, rank=0)
preemption = Preemption(folder, exit_file, watch_file=True, end_process=os._exit)
print("listens", flush=True)
shown = ""
while True:
    if preemption.is_requested() and preemption.reason != shown:
        shown = preemption.reason
        print(shown, flush=True)
    time.sleep(0.01)
"""


class Listener:
    """A process that listens for requests to stop, and never does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTENER, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert self.line() == "listens"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def lives(self) -> bool:
        """Signals are delivered within milliseconds; half a second without an end is life."""
        time.sleep(0.5)
        return self.process.poll() is None

    def ended(self) -> tuple[int, str]:
        """(exit code, the reason of exit.json)."""
        code = self.process.wait(30)
        return code, json.loads((self.folder / "exit.json").read_text())["reason"]


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    one = Listener(tmp_path)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def test_a_second_signal_ends_at_once(listener: Listener) -> None:
    listener.process.send_signal(signal.SIGUSR1)
    assert listener.line() == "SIGUSR1"
    time.sleep(COPY_SECONDS + 0.1)
    assert listener.lives()
    listener.process.send_signal(signal.SIGTERM)
    assert listener.ended() == (143, "SIGTERM after SIGUSR1: ended at once")


def test_a_closed_terminal_asks_for_a_checkpoint(listener: Listener) -> None:
    listener.process.send_signal(signal.SIGHUP)
    assert listener.line() == "SIGHUP"
    assert listener.lives()


def test_under_nohup_a_closed_terminal_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        preemption = Preemption(tmp_path, ExitFile(tmp_path, rank=0), watch_file=True)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not preemption.is_requested()
        preemption.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_copies_of_a_signal_are_one(listener: Listener) -> None:
    """Slurm signals all processes of a step; torchrun, signalled too, signals its ranks again."""
    listener.process.send_signal(signal.SIGTERM)
    listener.process.send_signal(signal.SIGTERM)
    assert listener.line() == "SIGTERM"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.lives()


def test_a_term_behind_the_file_leaves_the_checkpoint_its_time(listener: Listener) -> None:
    (listener.folder / STOP).touch()
    assert listener.line() == f"the file {listener.folder / STOP}"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.lives()
    time.sleep(COPY_SECONDS)
    listener.process.send_signal(signal.SIGTERM)
    assert listener.ended() == (
        143,
        f"SIGTERM after the file {listener.folder / STOP}: ended at once",
    )


def test_a_process_that_goes_on_is_interrupted_and_gets_its_signals_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    preemption = Preemption(tmp_path, ExitFile(tmp_path, rank=0), watch_file=True)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.is_requested() and preemption.reason == "SIGUSR1"
        preemption._signalled = time.monotonic() - COPY_SECONDS - 1
        with pytest.raises(KeyboardInterrupt, match="SIGUSR1 after SIGUSR1"):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        preemption.close()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert json.loads((tmp_path / "exit.json").read_text())["status"] == "failed"


def test_the_file_is_removed_when_the_run_has_ended(tmp_path: Path) -> None:
    preemption = Preemption(tmp_path, ExitFile(tmp_path, rank=0), watch_file=True)
    (tmp_path / STOP).touch()
    assert preemption.is_requested()
    preemption.on_fit_end(None)
    preemption.close()
    assert not (tmp_path / STOP).exists()


def test_a_checkpoint_longer_than_the_grace_period_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events = Events(tmp_path, enabled=True)
    warn_about_grace_period(events, 30.0, steps_done=5, seconds=29.0)
    warn_about_grace_period(events, None, steps_done=5, seconds=1e6)
    assert not (tmp_path / EVENTS).exists()
    warn_about_grace_period(events, 30.0, steps_done=10, seconds=31.5)
    (event,) = map(json.loads, (tmp_path / EVENTS).read_text().splitlines())
    assert (event["event"], event["steps_done"], event["grace_period_seconds"]) == (
        "grace_period_short",
        10,
        30.0,
    )
    assert (
        "the checkpoint after 10 steps took 31.5 s, the job's grace period is 30 s" in caplog.text
    )


@pytest.mark.parametrize(
    ("text", "seconds"), [("300", 300.0), ("", None), ("soon", None), ("0", None), ("-5", None)]
)
def test_the_grace_period_is_what_the_job_script_says(text: str, seconds: float | None) -> None:
    assert grace_period_seconds({GRACE_PERIOD: text}) == seconds
    assert grace_period_seconds({}) is None
