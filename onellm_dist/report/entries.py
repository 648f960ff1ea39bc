"""Entries of a run's JSON files, without the values that do not fit their key."""

from __future__ import annotations

from datetime import datetime
from typing import Any

Entry = dict[str, Any]

INTEGERS = frozenset(
    (
        "step",
        "steps_done",
        "first_step",
        "failed_step",
        "lost_steps",
        "world_size",
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
        "device_name",
        "slurm_node_list",
        "sample_id",
        "responsible_host",
    )
)
LARGEST_NUMBER = 1e15
"""No figure of a run is larger."""
LATEST_TIME = 4e9
"""No clock shows more seconds since 1970 (the year 2096)."""
TIME_FORMATS = ("%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S.%f%z", "%Y-%m-%dT%H:%M:%S")


def clean_entry(entry: Entry) -> Entry:
    """Drop values of the wrong type and add `at`, the entry's time in seconds since 1970.

    A failing disk or another program may have written anything.
    """
    kept = {key: value for key, value in entry.items() if _fits(key, value)}
    kept["at"] = to_timestamp(kept.get("time"))
    return kept


def pick(entry: Entry, *keys: str) -> Any:
    """The value of the first of these keys that has one, else None."""
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def to_number(value: Any) -> float:
    """The number, also if it is written as text; 0 for anything else.

    JSON has null for a number that is not finite.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def to_timestamp(value: Any) -> float | None:
    """A time as seconds since 1970; None for anything that is not a time.

    Files hold a number, or ISO text with or without a zone (`2026-11-20T09:14:15+0000`).
    """
    if _is_number(value):
        return float(value) if 0 < value < LATEST_TIME else None
    if not isinstance(value, str):
        return None
    for form in TIME_FORMATS:
        try:
            return datetime.strptime(value, form).timestamp()
        except (ValueError, OverflowError):
            continue
    return None


def _fits(key: str, value: Any) -> bool:
    """Whether the value has the type that its key asks for; None always fits."""
    if value is None:
        return key not in ("offending_samples", "faults", "nodes")
    if key in INTEGERS:
        return (
            isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_NUMBER
        )
    if key in NUMBERS:
        return _is_number(value) and (value >= 0 or key == "loss")
    if key in TEXTS:
        return isinstance(value, str)
    if key in ("loss_by_modality", "grad_norm_by_part"):
        return isinstance(value, dict) and all(v is None or _is_number(v) for v in value.values())
    if key == "router_load":
        rows = value.values() if isinstance(value, dict) else [value]
        return all(isinstance(row, list) and all(_is_number(v) for v in row) for row in rows)
    if key in ("offending_samples", "faults"):
        return isinstance(value, list)
    if key == "nodes":
        return (
            all(isinstance(v, str) for v in value)
            if isinstance(value, list)
            else isinstance(value, (str, int, dict))
        )
    return True


def _is_number(value: Any) -> bool:
    """Whether a value is a number of a sensible size; NaN is not."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < LARGEST_NUMBER
    )
