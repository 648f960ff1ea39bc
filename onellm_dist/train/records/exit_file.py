"""How a start of the run ended: `exit.json`, which scripts read because launchers blur exit codes, and the exit itself."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE
from onellm_dist.train.heartbeat import InFlight

CODES = {"done": EXIT_DONE, "failed": EXIT_FAILED, "usage": EXIT_USAGE, "preempted": EXIT_PREEMPTED}
EXIT_FILE = "exit.json"
WORKER_DIED = "DataLoader worker"
"""torch's message of a loader process that was killed or crashed begins so (2.15)."""


class ExitFile:
    """`RUN_DIR/exit.json`: status, exit_code, steps_done, reason, rank, time; where the status is `failed`, also failed_step
    (index of the step that was under way, or null) and offending_samples (ids of the samples of the micro-step that this rank was at).
    The rank that writes first is believed: the others fail because it did.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.run_dir = run_dir
        self._path, self._rank = run_dir / EXIT_FILE, rank
        self.step: int | None = None
        """Steps done so far; kept up to date by the loop."""
        self.in_flight = InFlight()
        """What this rank is at."""
        self.on_failure: Callable[[dict[str, Any]], None] | None = None
        """Told what was written, when a failure is recorded by this rank; set once the run has a record of its events."""
        self.last_act: Callable[[], None] | None = None
        """What a start that failed still does, for some seconds, before its process ends."""

    def clear(self) -> None:
        """Forget how the start before this one ended. Rank 0 calls it, before any rank can fail over a message."""
        self._path.unlink(missing_ok=True)

    def replace(self, status: str, *, reason: str) -> int:
        """Record the end of a start that had no ranks yet."""
        self.clear()
        return self.write(status, reason=reason)

    def write(self, status: str, *, reason: str, **more: Any) -> int:
        """Record the end, unless another rank did; `more` goes in as it is. Returns the exit code."""
        code = CODES[status]
        found: dict[str, Any] = {
            "status": status,
            "exit_code": code,
            "steps_done": self.step,
            "reason": reason,
            "rank": self._rank,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if status == "failed":
            found["failed_step"] = self.in_flight.step
            died = WORKER_DIED in reason
            found["offending_samples"] = (
                more.pop("offending_samples")
                if "offending_samples" in more
                else self.in_flight.suspects(read_ahead=died)
            )
            found |= more
        own = self._path.with_name(f".{EXIT_FILE}.{self._rank}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            os.link(own, self._path)
            if status == "failed" and self.on_failure is not None:
                self.on_failure(found)
        except FileExistsError:
            pass
        except OSError as error:  # a full or missing disk must not hide why the run ended
            print(f"{self._path} could not be written: {error}", file=sys.stderr)
        finally:
            own.unlink(missing_ok=True)
        return code


def end_process(code: int) -> NoReturn:
    """Flush and leave without Python's clean-up: gloo's threads abort in it in a fifth to a half of runs (torch 2.13, 2.15)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
