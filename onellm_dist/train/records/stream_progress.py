"""How far a run has come: `samples/progress` and `samples/starts.jsonl`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from onellm_dist.common.files import repair_last_line
from onellm_dist.common.run_files import PROGRESS, STARTS
from onellm_dist.train.records.json_lines import append_lines

PROGRESS_BYTES = 16


class StreamProgress:
    """The steps done, written in place each step; a kill of the process does not lose them.

    `samples/starts.jsonl` has one object per start, resume or rollback: `time`, `first_step`,
    `lost_to`. Steps first_step .. lost_to - 1 had been done before and are repeated.

    Args:
        folder: `RUN_DIR/samples`.
        writes: whether this process writes; false on every rank but rank 0.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._starts = folder / STARTS
        self._handle: int | None = None
        if writes:
            repair_last_line(self._starts)
            self._handle = os.open(folder / PROGRESS, os.O_RDWR | os.O_CREAT, 0o644)

    def begin(self, first_step: int) -> int:
        """Record that the stream begins, or begins again, at `first_step`.

        Returns:
            How many steps are repeated (on rank 0; 0 elsewhere).
        """
        if self._handle is None:
            return 0
        text = os.pread(self._handle, PROGRESS_BYTES, 0).strip()
        done = int(text) if text.isdigit() else 0
        lost_to = done if done > first_step else None
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "first_step": first_step,
            "lost_to": lost_to,
        }
        append_lines(self._starts, [entry])
        self.update(first_step)
        return 0 if lost_to is None else lost_to - first_step

    def update(self, steps_done: int) -> None:
        """Write how many steps are done."""
        if self._handle is not None:
            os.pwrite(self._handle, f"{steps_done:<{PROGRESS_BYTES - 1}}\n".encode(), 0)

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
