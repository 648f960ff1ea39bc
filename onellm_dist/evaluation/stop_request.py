"""A request to stop: the file `stop` in the folder of the answers, as job scripts make it."""

from __future__ import annotations

import time
from pathlib import Path

from onellm_dist.common.errors import EXIT_PREEMPTED, OneLLMError
from onellm_dist.common.run_files import EVALUATION, STOP


class StoppedError(OneLLMError):
    """An evaluation left because it was asked to; its answers are on the disk (exit code 75)."""

    exit_code = EXIT_PREEMPTED


class StopRequest:
    """Notices requests that are made after it was made itself: older ones are of other starts.

    Args:
        out: folder of the answers.
    """

    def __init__(self, out: Path) -> None:
        self._since = time.time()
        self._paths = [out / STOP]
        if out.parent.name == EVALUATION:  # a checkpoint of a run: its job has a folder for all
            self._paths.append(out.parent / STOP)

    def check(self) -> None:
        """Leave if a stop was asked for.

        Raises:
            StoppedError: it was.
        """
        for path in self._paths:
            try:
                asked = path.stat().st_mtime >= self._since
            except OSError:
                continue
            if asked:
                raise StoppedError(
                    f"{path}: asked to stop",
                    "what was answered is on the disk.",
                    "the same command answers the rest.",
                )
