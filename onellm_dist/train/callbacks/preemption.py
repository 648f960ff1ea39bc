"""Requests to stop: USR1, TERM, INT or HUP, or a file `stop` in the run directory.

All ranks agree to stop at the end of a step. The job scheduler gives a grace period between its
signal and the end of the job; a checkpoint that takes longer than that is warned about.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.files import stamp_file
from onellm_dist.common.run_files import STOP
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.exit_file import ExitFile

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""HUP: the terminal was closed, or the connection to it was lost."""
COPY_SECONDS = 1.0
"""Signals within this time of the first are copies of it: Slurm signals every process of a step,
and launchers signal their ranks once more."""
GRACE_PERIOD = "ONELLM_GRACE_PERIOD_S"
"""Environment variable: seconds of warning before the job ends (`onellm launch --grace-period`)."""


class Preemption(Callback):
    """Listens on this rank for requests to stop.

    The first signal asks for a checkpoint at the end of the step; a second one ends the process at
    once. The `deepspeed` launcher passes no signals on; the file is for it (`touch RUN_DIR/stop`).
    The file is not a signal: a TERM after it (Slurm's, when the grace period is over) is the first,
    and leaves a checkpoint that is being written the time until the KILL.

    Args:
        run_dir: the run directory.
        exit_file: where a second signal is recorded.
        watch_file: whether this process looks for the file; false on every rank but rank 0.
        end_process: ends the process with an exit code; default: KeyboardInterrupt is raised in the
            main thread instead.
    """

    def __init__(
        self,
        run_dir: Path,
        exit_file: ExitFile,
        *,
        watch_file: bool,
        end_process: Callable[[int], Any] | None = None,
    ) -> None:
        self._file = run_dir / STOP
        self._exit_file = exit_file
        self._watch_file = watch_file
        self._end_process = end_process
        self._pid = os.getpid()
        self._signalled: float | None = None
        self._replaced: dict[signal.Signals, Any] = {}
        self.reason = ""
        """Why this rank was asked to stop; "" where it was not."""
        self._earlier = stamp_file(self._file) if watch_file else None
        """Stamp of a file from before this start: it meant another one."""
        self._listen()

    def _listen(self) -> None:
        """Install the signal handlers; Python allows it in the main thread alone.

        A HUP that is ignored (`nohup`) stays ignored.
        """
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._replaced[number] = signal.signal(number, self._on_signal)

    def is_requested(self) -> bool:
        """Whether this rank was asked to stop."""
        if not self.reason and self._watch_file and self._file_is_new():
            self.reason = f"the file {self._file}"
        return bool(self.reason)

    def discard_earlier(self) -> None:
        """Remove a file from before this start."""
        if self._earlier is not None and not self._file_is_new():
            self._file.unlink(missing_ok=True)
        self._earlier = None

    def _file_is_new(self) -> bool:
        return stamp_file(self._file) not in (None, self._earlier)

    def on_fit_end(self, outcome: object) -> None:
        """Remove the file, so that the next start trains."""
        if self._watch_file:
            self._file.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the signals back to whoever handled them before."""
        while self._replaced:
            number, handler = self._replaced.popitem()
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked loader worker: the training process decides
            return
        name = signal.Signals(number).name
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
            self.reason = self.reason or name
        elif now - self._signalled > COPY_SECONDS:
            reason = f"{name} after {self.reason}: ended at once"
            self._exit_file.write("failed", reason=reason)
            if self._end_process is None:
                raise KeyboardInterrupt(reason)
            self._end_process(128 + number)


def grace_period_seconds(env: Mapping[str, str] = os.environ) -> float | None:
    """The grace period; None where the job sets none (or something that is not a number)."""
    try:
        seconds = float(env.get(GRACE_PERIOD, ""))
    except ValueError:
        return None
    return seconds if seconds > 0 else None


def warn_about_grace_period(
    events: Events, grace_period: float | None, *, steps_done: int, seconds: float
) -> None:
    """Write an event `grace_period_short` where a checkpoint took longer than the grace period.

    Args:
        events: where it goes.
        grace_period: seconds; None: nothing is compared.
        steps_done: steps done at the checkpoint.
        seconds: how long the checkpoint took.
    """
    if grace_period is None or seconds <= grace_period:
        return
    events.write(
        "grace_period_short",
        steps_done=steps_done,
        seconds=seconds,
        grace_period_seconds=grace_period,
        message=f"the checkpoint after {format_count(steps_done, 'step')} took {seconds:.3g} s, "
        "the job's grace "
        f"period is {grace_period:g} s: a preemption would lose work. Raise it (onellm launch "
        "--grace-period), or use a faster disk.",
        warning=True,
    )
