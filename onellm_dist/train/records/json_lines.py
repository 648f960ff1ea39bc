"""JSON-lines files that survive a kill: append, read, drop lines of steps that are repeated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.files import write_atomic


def to_json(value: Any) -> Any:
    """The value with null for numbers that are not finite, since JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: to_json(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return value


def append_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per entry and force the file to the disk.

    Raises:
        OSError: the disk refuses.
    """
    with path.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        out.flush()
        os.fsync(out.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without lines that a kill cut short; [] without a file."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict):
                found.append(entry)
    return found


def drop_lines_from(path: Path, first: int, *, key: str = "step") -> list[dict[str, Any]]:
    """Remove the lines whose `key` is `first` or more, and lines that are not whole.

    The file is replaced as a whole. A missing file stays missing.

    Returns:
        The removed lines that were whole.
    """
    if not path.is_file():
        return []
    kept: list[str] = []
    dropped: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            earlier = entry[key] < first
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if earlier:
            kept.append(line + "\n")
        else:
            dropped.append(entry)
    write_atomic(path, "".join(kept))
    return dropped
