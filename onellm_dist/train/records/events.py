"""`events.jsonl`: what happened in a run beside its steps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from onellm_dist.common.files import repair_last_line
from onellm_dist.common.logging import get_logger
from onellm_dist.common.run_files import EVENTS
from onellm_dist.common.secrets import mask_value
from onellm_dist.train.records.json_lines import to_json
from onellm_dist.train.records.patient_file import PatientFile

log = get_logger(__name__)


class Events:
    """Appends to `events.jsonl`; lines that the disk has no room for wait.

    Args:
        run_dir: the run directory.
        enabled: whether this process writes; false on every rank but rank 0.
        repair: whether to remove a last line that a kill cut short; no other process may write.
    """

    def __init__(self, run_dir: Path, *, enabled: bool, repair: bool = True) -> None:
        self._file = PatientFile(run_dir / EVENTS) if enabled else None
        if enabled and repair:
            repair_last_line(run_dir / EVENTS)

    def write(self, event: str, *, message: str = "", warning: bool = False, **fields: Any) -> None:
        """Record an event.

        Args:
            event: its name, one of `event_fields.EVENT_FIELDS`.
            message: text for the terminal; it is not stored.
            warning: whether the message is a warning.
            fields: what the event says, as JSON values; numbers that are not finite become null.
        """
        if self._file is None:
            return
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "event": event,
            **mask_value(to_json(fields)),
        }
        self._file.append(json.dumps(line) + "\n")
        if message:
            (log.warning if warning else log.info)("%s", message)
