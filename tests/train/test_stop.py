"""What asks a rank to stop, and what ends it at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onellm_dist.train.callbacks.preemption import COPY_SECONDS, STOP_FILE

LISTENER = """
import sys, time
from pathlib import Path
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.callbacks.preemption import StopRequest
folder = Path(sys.argv[1])
stop = StopRequest(folder, ExitFile(folder, rank=0), watch_file=True)
print("listens", flush=True)
said = ""
while True:
    if stop.asked() and stop.reason != said:
        said = stop.reason
        print(said, flush=True)
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


def test_copies_of_a_signal_are_one(listener: Listener) -> None:
    """Slurm tells all processes of a step; torchrun, told too, tells its ranks again."""
    listener.process.send_signal(signal.SIGTERM)
    listener.process.send_signal(signal.SIGTERM)
    assert listener.line() == "SIGTERM"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.lives()


def test_a_term_behind_the_file_leaves_the_checkpoint_its_time(listener: Listener) -> None:
    (listener.folder / STOP_FILE).touch()
    assert listener.line() == f"the file {listener.folder / STOP_FILE}"
    listener.process.send_signal(signal.SIGTERM)
    assert listener.lives()
    time.sleep(COPY_SECONDS)
    listener.process.send_signal(signal.SIGTERM)
    assert listener.ended() == (
        143,
        f"SIGTERM after the file {listener.folder / STOP_FILE}: ended at once",
    )
