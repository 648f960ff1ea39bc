"""JSON-lines files that survive a kill: append, read, drop lines of steps that are repeated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
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
    return [entry for _, entry in _parse_lines(path)] if path.is_file() else []


def _parse_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines that are complete JSON objects, and these."""
    # A line ends at LF alone: keys of samples may have other ends of lines in them.
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):  # ValueError: also integers of over 4300 digits
            continue
        if isinstance(entry, dict):
            yield line, entry


def drop_lines_from(path: Path, first: int, *, key: str = "step") -> list[dict[str, Any]]:
    """Remove the lines whose `key` is `first` or more, and lines that are not complete.

    The file is replaced as a whole. A missing file stays missing.

    Returns:
        The removed lines that were complete.
    """
    if not path.is_file():
        return []
    kept: list[bytes] = []
    dropped: list[dict[str, Any]] = []
    for line, entry in _parse_lines(path):
        try:
            earlier = entry[key] < first
        except (KeyError, TypeError):
            continue
        if earlier:
            kept.append(line + b"\n")
        else:
            dropped.append(entry)
    write_atomic(path, b"".join(kept))
    return dropped
