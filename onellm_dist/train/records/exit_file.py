"""`exit.json`: how a start ended. Scripts read it, because launchers blur exit codes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_USAGE,
    MachineError,
    OneLLMError,
)
from onellm_dist.common.logging import get_logger
from onellm_dist.common.run_files import EXIT
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


class ExitFile:
    """`RUN_DIR/exit.json`: status, exit_code, steps_done, reason, rank, time.

    Where the status is `failed`, also failed_step (index of the step that was under way, or null)
    and offending_samples (ids of the samples of the micro-batch that this rank was at; none where
    the machine failed). The rank that writes first is believed: the others fail because it did.

    Args:
        run_dir: the run directory.
        rank: this rank.
        heartbeat: what this rank is doing.
    """

    def __init__(self, run_dir: Path, *, rank: int, heartbeat: Heartbeat | None = None) -> None:
        self.run_dir = run_dir
        self.heartbeat = heartbeat or Heartbeat()
        self.on_failure: Callable[[dict[str, Any]], None] | None = None
        """Receives what was written, if this rank records a failure."""
        self._path = run_dir / EXIT
        self._rank = rank

    def clear(self) -> None:
        """Remove the file of the start before this one.

        Rank 0 calls it, before any rank can fail over a message.
        """
        self._path.unlink(missing_ok=True)

    def replace(self, status: str, *, reason: str) -> int:
        """Record the end of a start that has no ranks yet; return its exit code."""
        self.clear()
        return self.write(status, reason=reason)

    def write_failure(self, error: BaseException) -> int:
        """Record that this rank failed with `error`; return the exit code."""
        if isinstance(error, MachineError):
            return self.write("failed", reason=error.what, offending_samples=[])
        if isinstance(error, OneLLMError):
            status = "usage" if error.exit_code == EXIT_USAGE else "failed"
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
        code = EXIT_CODES[status]
        found: dict[str, Any] = {
            "status": status,
            "exit_code": code,
            "steps_done": self.heartbeat.steps_done,
            "reason": reason,
            "rank": self._rank,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if status == "failed":
            found["failed_step"] = self.heartbeat.step
            if "offending_samples" not in more:
                more["offending_samples"] = self.heartbeat.offending_samples()
            found |= more
        self._link(mask_value(found))
        return code

    def _link(self, found: dict[str, Any]) -> None:
        """Give the file its name, if no other rank has: a hard link is taken once."""
        own = self._path.with_name(f".{EXIT}.{self._rank}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            os.link(own, self._path)
            if found["status"] == "failed" and self.on_failure is not None:
                self.on_failure(found)
        except FileExistsError:
            pass
        except OSError as error:  # a full or missing disk must not hide why the run ended
            log.error("%s could not be written: %s", self._path, error)
        finally:
            own.unlink(missing_ok=True)
