"""`exit.json`: how a start ended. Scripts read it, because launchers blur exit codes.

A start that is refused leaves no `exit.json` in the directory of a run, but a line in
`refusals.jsonl`: the file belongs to the start that is running, or to the latest one that ran.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_USAGE,
    BudgetLoweredError,
    MachineError,
    OneLLMError,
    RunInUseError,
)
from onellm_dist.common.files import FileStamp, stamp_file
from onellm_dist.common.logging import get_logger
from onellm_dist.common.refusals import append_refusal, was_refused
from onellm_dist.common.run_files import CHECKPOINTS, CONFIG, EXIT
from onellm_dist.common.secrets import mask_value
from onellm_dist.train.heartbeat import Heartbeat

log = get_logger(__name__)
EXIT_CODES = {
    "done": EXIT_DONE,
    "failed": EXIT_FAILED,
    "usage": EXIT_USAGE,
    "preempted": EXIT_PREEMPTED,
}
"""Status of a start -> exit code of its processes."""
REFUSED = "refused"
"""Field of an `exit.json` that a refused start wrote in a directory without a run."""
START_SPREAD_S = 10.0
"""Seconds within which the ranks of a start begin."""


class DirectoryHold(IntEnum):
    """How far a start has come with its run directory."""

    OUTSIDE = 0
    """The start does not hold the directory yet: another start may be running in it."""
    HOLDS = 1
    """The start holds the directory, and has changed nothing in it."""
    BEGUN = 2
    """Nothing was left to refuse: the directory is that of this start."""


class ExitFile:
    """`RUN_DIR/exit.json`: status, exit_code, steps_done, reason, rank, time.

    Where the status is `failed`, also failed_step (index of the step that was under way, or null)
    and offending_samples (ids of the samples of the micro-batch that this rank was processing;
    none where the machine failed), and where an out-of-memory lowered the token budgets
    budget_lowered. The first rank to write is taken as the cause; the others fail as a consequence.

    Args:
        run_dir: the run directory.
        rank: this rank.
        heartbeat: what this rank is doing.
        start: names this start (`refusals.describe_start`).
    """

    def __init__(
        self, run_dir: Path, *, rank: int, heartbeat: Heartbeat | None = None, start: str = ""
    ) -> None:
        self.run_dir = run_dir
        self.heartbeat = heartbeat or Heartbeat()
        self.on_failure: Callable[[dict[str, Any]], None] | None = None
        """Receives what was written, if this rank records a failure."""
        self._path = run_dir / EXIT
        self._rank = rank
        self._start = start
        self._hold = DirectoryHold.OUTSIDE
        self._earlier: FileStamp | None = None
        self._refused = False
        self._began = time.time()

    def find_earlier(self) -> FileStamp | None:
        """What distinguishes the file of an earlier start from one of this start."""
        return stamp_file(self._path)

    def hold(self, earlier: FileStamp | None) -> None:
        """This start holds the run directory now. Every rank calls it.

        Args:
            earlier: what rank 0's `find_earlier` gave when it had the lock.
        """
        self._earlier = earlier
        self._hold = DirectoryHold.HOLDS

    def begin(self) -> None:
        """The run directory is that of this start now.

        Every rank calls it, after rank 0 has removed what earlier starts left (`remove_earlier`).
        """
        self._hold = DirectoryHold.BEGUN

    def remove_earlier(self) -> None:
        """Remove the file of an earlier start, or of one that was refused meanwhile.

        Rank 0 calls it. What a rank of this start has written stays.
        """
        if self._is_earlier() or is_of_refused_start(self._path):
            self._path.unlink(missing_ok=True)

    def write_failure(self, error: BaseException) -> int:
        """Record that this rank failed with `error`, or was refused; return the exit code."""
        if isinstance(error, BudgetLoweredError):
            return self.write(
                "failed", reason=error.what, offending_samples=[], budget_lowered=True
            )
        if isinstance(error, MachineError):
            return self.write("failed", reason=error.what, offending_samples=[])
        if isinstance(error, OneLLMError):
            status = "usage" if error.exit_code == EXIT_USAGE else "failed"
            if self._hold is not DirectoryHold.BEGUN and (
                status == "usage" or isinstance(error, RunInUseError)
            ):
                return self._refuse(status, error)
            return self.write(status, reason=error.what)
        return self.write("failed", reason=f"{type(error).__name__}: {error}")

    def write(self, status: str, *, reason: str, **more: Any) -> int:
        """Record the end, unless another rank has.

        Args:
            status: one of `EXIT_CODES`.
            reason: why, for people.
            more: further fields of a failure.

        Returns:
            The exit code.
        """
        found = self._describe(status, reason)
        if status == "failed":
            found["failed_step"] = self.heartbeat.step
            if "offending_samples" not in more:
                more["offending_samples"] = self.heartbeat.offending_samples()
            found |= more
        self._record(mask_value(found))
        return EXIT_CODES[status]

    def _describe(self, status: str, reason: str) -> dict[str, Any]:
        return {
            "status": status,
            "exit_code": EXIT_CODES[status],
            "steps_done": self.heartbeat.steps_done,
            "reason": reason,
            "rank": self._rank,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def _refuse(self, status: str, error: OneLLMError) -> int:
        """Record a refusal once per start, and leave the run as it is.

        A directory without a run also gets an `exit.json`: nobody else's can be there.
        """
        code = EXIT_CODES[status]
        if self._refused:
            return code
        self._refused = True
        fresh = not any((self.run_dir / name).exists() for name in (CONFIG, CHECKPOINTS))
        try:
            is_first = append_refusal(
                self.run_dir,
                status=status,
                exit_code=code,
                reason=str(mask_value(error.what)),
                rank=self._rank,
                start=self._start,
                since=self._began - START_SPREAD_S,
            )
            if is_first and fresh and not isinstance(error, RunInUseError):
                found = mask_value({**self._describe(status, error.what), REFUSED: True})
                self._write_refused(found)
        except OSError as problem:  # it must not hide why the start was refused
            if self.run_dir.is_dir():
                log.warning("%s cannot be written to: %s", self.run_dir, problem)
        return code

    def _write_refused(self, found: dict[str, Any]) -> None:
        """Write the file of a refused start, unless a start that ran has written one meanwhile."""
        own = self._path.with_name(f".{EXIT}.refused.{self._rank}.{os.getpid()}")
        try:
            own.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            os.link(own, self._path)
        except FileExistsError:
            if is_of_refused_start(self._path):
                own.replace(self._path)
        finally:
            own.unlink(missing_ok=True)

    def _record(self, found: dict[str, Any]) -> None:
        """Give the file its name, if no other rank has: a hard link is taken once."""
        if self._hold is DirectoryHold.HOLDS and self._peer_was_refused():
            return  # another rank was refused, and this one fails because it has ended
        own = self._path.with_name(f".{EXIT}.{self._rank}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            if self._is_earlier() or self._is_of_other_refused_start():
                own.replace(self._path)
            else:
                os.link(own, self._path)
            if found["status"] == "failed" and self.on_failure is not None:
                self.on_failure(found)
        except FileExistsError:
            pass
        except OSError as error:  # a full or missing disk must not hide why the run ended
            log.error("%s could not be written: %s", self._path, error)
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)

    def _peer_was_refused(self) -> bool:
        return bool(self._start) and was_refused(
            self.run_dir, self._start, since=self._began - START_SPREAD_S
        )

    def _is_of_other_refused_start(self) -> bool:
        """Whether a start was refused and wrote the file while this one held the directory."""
        return self._hold is not DirectoryHold.OUTSIDE and is_of_refused_start(self._path)

    def _is_earlier(self) -> bool:
        """Whether the file there is that of an earlier start, and this start may replace it."""
        return (
            self._hold is not DirectoryHold.OUTSIDE
            and self._earlier is not None
            and self._earlier == stamp_file(self._path)
        )


def is_of_refused_start(path: Path) -> bool:
    """Whether an `exit.json` is that of a refused start: one of a directory without a run."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get(REFUSED))
    except (OSError, ValueError, RecursionError, AttributeError):
        return False
