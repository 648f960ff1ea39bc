"""What the files of a run directory hold, even if they are incomplete or missing."""

from __future__ import annotations

import fcntl
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from onellm_dist.common import run_files
from onellm_dist.common.errors import UsageError
from onellm_dist.report.entries import Entry, clean_entry

MARKERS = (
    run_files.CONFIG,
    run_files.METRICS,
    run_files.EVENTS,
    run_files.VALIDATION,
    run_files.EXIT,
    run_files.ATTEMPTS,
)
"""Any one of these files makes a folder a run directory."""


@dataclass
class RunRecords:
    """Entries of a run directory's files. A missing file is an empty list or None.

    The key `at` of an entry is its `time` in seconds since 1970.
    """

    directory: Path
    config: Entry
    steps: list[Entry]
    """Valid lines of `metrics.jsonl`: the last line of each step, in order."""
    overwritten: list[Entry]
    """Lines of steps that a later line of the same file repeated (a rollback within a start)."""
    validation: list[Entry]
    events: list[Entry]
    attempts: list[Entry]
    """Lines of `attempts.jsonl`, which the Slurm job script writes."""
    exit: Entry | None
    preflight: Entry | None
    """What `onellm doctor --distributed` found last."""
    skipped_samples: list[Entry]
    running: bool | None
    """Whether a process holds the run directory; None if the file system does not say."""
    last_write: float | None
    """When `metrics.jsonl` or `events.jsonl` was last written."""
    now: float
    moved_aside: list[str] = field(default_factory=list)
    """Folders with files of starts that no later start resumed from."""
    broken_lines: Counter[str] = field(default_factory=Counter)
    """File -> number of its lines that are not JSON objects."""

    def select_events(self, *names: str) -> list[Entry]:
        """The events with one of these names."""
        return [e for e in self.events if e.get("event") in names]

    def get_setting(self, section: str, key: str) -> Any:
        """A key of the resolved recipe, or None."""
        part = self.config.get(section)
        return part.get(key) if isinstance(part, dict) else None


def read_records(directory: Path, *, now: float | None = None) -> RunRecords:
    """Read a run directory without changing anything in it.

    Args:
        directory: `run.dir` of a run.
        now: the current time in seconds since 1970; default: the clock's.

    Raises:
        UsageError: the folder is not a run directory.
    """
    if not any((directory / name).exists() for name in MARKERS):
        raise UsageError(
            f"{directory} is not a run directory",
            f"it has none of {', '.join(MARKERS)}.",
            "give the run.dir of a training run.",
        )
    broken = Counter[str]()

    def read(path: Path) -> list[Entry]:
        entries, count = _read_lines(path)
        if count:
            broken[str(path.relative_to(directory))] += count
        return entries

    def read_counted(name: str, key: str) -> list[Entry]:
        return [e for e in read(directory / name) if isinstance(e.get(key), int)]

    steps, overwritten = _drop_repeated(read_counted(run_files.METRICS, "step"))
    written = [
        path.stat().st_mtime
        for name in (run_files.METRICS, run_files.EVENTS)
        if (path := directory / name).is_file()
    ]
    skipped = sorted(
        path
        for path in (directory / run_files.SAMPLES).glob(run_files.SKIPPED_PATTERN)
        if path.name != run_files.SKIPPED_INHERITED
    )
    return RunRecords(
        directory=directory,
        config=_read_config(directory / run_files.CONFIG),
        steps=steps,
        overwritten=overwritten,
        validation=read_counted(run_files.VALIDATION, "steps_done"),
        events=read(directory / run_files.EVENTS),
        attempts=read(directory / run_files.ATTEMPTS),
        exit=_read_object(directory / run_files.EXIT),
        preflight=_read_object(directory / run_files.PREFLIGHT),
        skipped_samples=[e for path in skipped for e in read(path)],
        running=_is_locked(directory / run_files.LOCK),
        last_write=max(written, default=None),
        now=time.time() if now is None else now,
        moved_aside=sorted(path.name for path in directory.glob("before-*") if path.is_dir()),
        broken_lines=broken,
    )


def _read_lines(path: Path) -> tuple[list[Entry], int]:
    """Objects of a JSON-lines file, and how many lines are not objects.

    A kill leaves half a line, a disk error leaves zeros.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return [], 0
    entries = list[Entry]()
    broken = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(entry, dict):
            entries.append(clean_entry(entry))
        else:
            broken += 1
    return entries, broken


def _drop_repeated(lines: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Split lines into those of rising steps and those that later lines repeated."""
    kept = list[Entry]()
    repeated = list[Entry]()
    for line in lines:
        while kept and kept[-1]["step"] >= line["step"]:
            repeated.append(kept.pop())
        kept.append(line)
    return kept, repeated


def _read_config(path: Path) -> Entry:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {str(k): v for k, v in config.items()} if isinstance(config, dict) else {}


def _read_object(path: Path) -> Entry | None:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return clean_entry(entry) if isinstance(entry, dict) else None


def _is_locked(path: Path) -> bool | None:
    """Whether rank 0 of a start holds the lock; None if the file system does not say.

    A start that asks for the lock at the same moment tries again
    (train/records/run_directory.py).
    """
    try:
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                return None
            return False
    except OSError:
        return None
