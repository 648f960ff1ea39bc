"""A tracker of somebody else, for accelerate: each call is a line of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker


class Lines(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """Writes PROJECT.jsonl in the folder of the trackers."""

    name, requires_logging_directory = "lines", True

    def __init__(self, project: str, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / f"{project}.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    def start(self) -> None:
        self.path.parent.mkdir(parents=True)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        with self.path.open("a") as out:
            out.write(json.dumps({"step": step, **values}) + "\n")
