"""Being asked to stop: USR1, TERM or INT, or a file `stop` in the run directory. All ranks agree at the end of a step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from onellm_dist.train.records.exit_file import ExitFile

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
STOP_FILE = "stop"
COPY_SECONDS = 1.0
"""Signals this close behind the first are copies of it: Slurm tells every process of a step, and launchers tell their ranks once more."""


class StopRequest:
    """Listens on this rank. The first signal asks for a checkpoint at the end of the step; a second one ends the process at once.

    The `deepspeed` launcher passes no signals on; the file is for it (`touch RUN_DIR/stop`). The file is no signal: a TERM behind it
    (Slurm's, when the notice is over) is the first, and leaves a checkpoint that is being written the time until the KILL.
    """

    def __init__(self, run_dir: Path, exit_file: ExitFile, *, watch_file: bool) -> None:
        self._file = run_dir / STOP_FILE
        self._exit_file, self._watch_file, self._pid = exit_file, watch_file, os.getpid()
        self._signalled: float | None = None
        self.reason = ""
        if watch_file:
            self._file.unlink(missing_ok=True)  # left from before this start; it meant another one
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        if not self.reason and self._watch_file and self._file.exists():
            self.reason = f"the file {self._file}"
        return bool(self.reason)

    def honoured(self) -> None:
        """The stop is done: take the file away, so that the next start goes on."""
        if self._watch_file:
            self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked loader worker: the training process decides
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if self._signalled is None:
            self._signalled = now
            self.reason = self.reason or name
        elif now - self._signalled > COPY_SECONDS:
            self._exit_file.write("failed", reason=f"{name} after {self.reason}: ended at once")
            os._exit(128 + number)
