"""Output of the local ranks of a run: `RUN_DIR/logs/` has it once their start has begun.

Until then a start may be refused, and must leave the run directory as it was: the ranks write to a
temporary folder, and each moves its own output when nothing is left to refuse.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from onellm_dist.common.files import unique_name
from onellm_dist.common.logging import get_logger

LOG_VARIABLE = "ONELLM_LOCAL_LOG"
"""File that the output of this local rank goes to."""
LOGS_VARIABLE = "ONELLM_LOCAL_LOGS"
"""Folder where it belongs, once the start has begun."""

log = get_logger(__name__)


def move_own_log() -> None:
    """In a local rank, let stdout and stderr go to the run directory, with what was written so far.

    A link takes the place of the temporary file, for whoever reads it. Elsewhere nothing happens.
    """
    source, folder = os.environ.pop(LOG_VARIABLE, ""), os.environ.pop(LOGS_VARIABLE, "")
    if not source or not folder:
        return
    target = Path(folder) / Path(source).name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        descriptor = os.open(target, flags, 0o666)
        with os.fdopen(descriptor, "ab") as out, Path(source).open("rb") as written:
            shutil.copyfileobj(written, out)
            out.flush()
            for number in (1, 2):
                os.dup2(descriptor, number)
            shutil.copyfileobj(written, out)  # what other threads wrote meanwhile
        link = Path(source).with_name(unique_name())
        link.symlink_to(target.absolute())
        link.replace(source)
    except OSError as error:
        log.warning("%s cannot be written; this rank's output is lost: %s", target, error)


def keep_logs(folder: Path, logs: Path) -> None:
    """Copy the output of ranks that failed before their start had begun.

    Args:
        folder: the temporary folder.
        logs: `RUN_DIR/logs`.
    """
    for path in folder.glob("rank-*.log"):
        if not path.is_symlink() and path.stat().st_size:
            try:
                logs.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, logs / path.name)
            except OSError as error:
                log.warning("%s cannot be written: %s", logs / path.name, error)
