"""The files of a run directory, read as they are: still growing, cut short by a kill, or not there at all."""

from __future__ import annotations

import fcntl
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.train.records.exit_file import EXIT_FILE
from onellm_dist.train.records.metrics import EVENTS, METRICS

CONFIG, LOCK, VALIDATION, ATTEMPTS = "config.yaml", ".lock", "validation.jsonl", "attempts.jsonl"
PREFLIGHT = "preflight.json"
FILES = (CONFIG, METRICS, EVENTS, VALIDATION, EXIT_FILE, ATTEMPTS)
"""One of them makes a folder a run directory; `attempts.jsonl` is the Slurm job script's."""

INTEGERS = frozenset(
    (
        "step",
        "steps_done",
        "first_step",
        "failed_step",
        "lost_steps",
        "world",
        "restart_count",
        "slurm_restart_count",
        "slurm_nodes",
        "checkpoint",
    )
)
NUMBERS = frozenset(
    (
        "seconds",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "data_wait_fraction",
        "padding_fraction",
        "mfu",
        "lost_seconds",
        "stall_seconds",
        "grace_period_seconds",
    )
)
TEXTS = frozenset(
    (
        "event",
        "name",
        "status",
        "reason",
        "time",
        "device",
        "slurm_node_list",
        "sample_id",
        "suspected_host",
    )
)
MOST, LATEST = 1e15, 4e9
"""No figure of a run is larger, and no clock shows more seconds since 1970 (the year 2096)."""

Entry = dict[str, Any]


@dataclass
class RunFiles:
    """What a run directory holds. `at` of an entry is its `time` in seconds since 1970; a missing file is an empty list."""

    directory: Path
    config: Entry
    steps: list[Entry]
    """Lines of `metrics.jsonl` that stand: the last one of each step, in order."""
    overwritten: list[Entry]
    """Lines of steps that a later line of the same file did again (a roll-back inside a start)."""
    validation: list[Entry]
    events: list[Entry]
    attempts: list[Entry]
    exit: Entry | None
    preflight: Entry | None
    """What `onellm doctor --distributed` found last."""
    skipped_samples: list[Entry]
    running: bool | None
    """Whether a process holds the run directory; None where the file system does not say."""
    last_sign: float | None
    """When `metrics.jsonl` or `events.jsonl` was written last."""
    now: float
    moved_aside: list[str] = field(default_factory=list)
    """Folders with files of starts that later ones did not go on from."""
    broken_lines: Counter[str] = field(default_factory=Counter)
    """File -> lines that are no JSON object."""

    def of(self, *names: str) -> list[Entry]:
        """Events of these names."""
        return [e for e in self.events if e.get("event") in names]

    def setting(self, section: str, key: str) -> Any:
        """A key of the resolved recipe, or None."""
        part = self.config.get(section)
        return part.get(key) if isinstance(part, dict) else None


def read_run(directory: Path, *, now: float | None = None) -> RunFiles:
    """Read a run directory without changing anything in it.

    Raises:
        UsageError: it is not one.
    """
    if not any((directory / name).exists() for name in FILES):
        raise UsageError(
            f"{directory} is not a run directory",
            f"none of {', '.join(FILES)} is there.",
            "give the run.dir of a training run.",
        )
    broken = Counter[str]()

    def lines(path: Path) -> list[Entry]:
        found, wrong = _read_lines(path)
        if wrong:
            broken[str(path.relative_to(directory))] += wrong
        return found

    steps, overwritten = _standing(
        [e for e in lines(directory / METRICS) if isinstance(e.get("step"), int)]
    )
    written = [
        path.stat().st_mtime for name in (METRICS, EVENTS) if (path := directory / name).is_file()
    ]
    return RunFiles(
        directory,
        _config(directory / CONFIG),
        steps,
        overwritten,
        [e for e in lines(directory / VALIDATION) if isinstance(e.get("step"), int)],
        lines(directory / EVENTS),
        lines(directory / ATTEMPTS),
        _object(directory / EXIT_FILE),
        _object(directory / PREFLIGHT),
        [
            e
            for path in sorted(directory.glob("ledger/skipped_samples-rank*.jsonl"))
            for e in lines(path)
        ],
        _held(directory / LOCK),
        max(written, default=None),
        time.time() if now is None else now,
        sorted(path.name for path in directory.glob("before-*") if path.is_dir()),
        broken,
    )


def cleaned(entry: Entry) -> Entry:
    """The entry without values that are not what their key says (a sick disk, another program's lines), and with `at`, its time."""
    found = {key: value for key, value in entry.items() if _fits(key, value)}
    found["at"] = seconds_since_1970(found.get("time"))
    return found


def _fits(key: str, value: Any) -> bool:
    if key in INTEGERS:
        return value is None or (
            isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST
        )
    if key in NUMBERS:
        return value is None or (_is_number(value) and (value >= 0 or key == "loss"))
    if key in TEXTS:
        return value is None or isinstance(value, str)
    if key in ("loss_by_modality", "grad_norm_by_part"):
        return value is None or (
            isinstance(value, dict) and all(v is None or _is_number(v) for v in value.values())
        )
    if key == "router_load":
        rows = value.values() if isinstance(value, dict) else [value]
        return value is None or all(
            isinstance(row, list) and all(_is_number(v) for v in row) for row in rows
        )
    if key in ("offending_samples", "faults"):
        return isinstance(value, list)
    if key == "nodes":
        return (
            isinstance(value, (str, int))
            or (isinstance(value, list) and all(isinstance(v, str) for v in value))
            or isinstance(value, dict)
        )
    return True


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST
    )  # not NaN either


def seconds_since_1970(value: Any) -> float | None:
    """A time as files give it: a number, or ISO text with or without a zone (`2026-11-20T09:14:15+0000`); None for anything else."""
    if _is_number(value):
        return float(value) if 0 < value < LATEST else None
    if not isinstance(value, str):
        return None
    for form in ("%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S.%f%z", "%Y-%m-%dT%H:%M:%S"):
        try:
            return datetime.strptime(value, form).timestamp()
        except (ValueError, OverflowError):
            continue
    return None


def _read_lines(path: Path) -> tuple[list[Entry], int]:
    """Objects of a JSON-lines file, and how many lines were none (a kill leaves half a line; a disk error leaves zeros)."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return [], 0
    found, wrong = list[Entry](), 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            wrong += 1
            continue
        if not isinstance(entry, dict):
            wrong += 1
            continue
        found.append(cleaned(entry))
    return found, wrong


def _standing(lines: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Lines by rising step: where the file goes back, what it did before from there on was done again."""
    kept, again = list[Entry](), list[Entry]()
    for line in lines:
        while kept and kept[-1]["step"] >= line["step"]:
            again.append(kept.pop())
        kept.append(line)
    return kept, again


def _config(path: Path) -> Entry:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}


def _object(path: Path) -> Entry | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    return cleaned(found)


def _held(path: Path) -> bool | None:
    """Whether rank 0 of a start holds the lock. A start that asks at the same moment tries again (train/records/run_directory.py)."""
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
