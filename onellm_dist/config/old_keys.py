"""Keys and values of 0.1.0 that were renamed: an old recipe is refused with the new names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED_SECTIONS: Mapping[str, str] = {"guard": "stability"}
"""Section of 0.1.0 to its name today; its keys kept theirs unless RENAMED_KEYS says otherwise."""
RENAMED_KEYS: Mapping[str, str] = {
    "data.max_tombstones": "data.max_skipped_samples",
    "data.new_segment": "data.new_phase",
    "track.starve_share": "track.underused_expert_share",
    "track.starve_steps": "track.underused_expert_steps",
}
"""Key of 0.1.0 to its name today."""
RENAMED_VALUES: Mapping[tuple[str, str], str] = {
    ("engine.reduce_every", "micro_step"): "micro_batch",
}
"""Key (as it is named today) and value of 0.1.0 to the value today."""


def find_new_name(key: str) -> str | None:
    """Return today's name of a key or section of 0.1.0, or None if it was not renamed."""
    if key in RENAMED_KEYS:
        return RENAMED_KEYS[key]
    section, dot, rest = key.partition(".")
    return f"{RENAMED_SECTIONS[section]}{dot}{rest}" if section in RENAMED_SECTIONS else None


def explain_old_key(key: str, value: Any) -> list[str]:
    """Return a message for each renamed key in an unknown key of a recipe; empty if there is none.

    Args:
        key: the unknown key or section.
        value: its value; the keys of a renamed section are listed one by one.
    """
    new = find_new_name(key)
    if new is None:
        return []
    if key not in RENAMED_SECTIONS or not isinstance(value, dict) or not value:
        return [f"{key} is called {new} now"]
    return [f"{key}.{name} is called {find_new_name(f'{key}.{name}')} now" for name in value]


def explain_old_value(key: str, value: Any) -> str | None:
    """Return a message if a value was renamed since 0.1.0, else None."""
    new = RENAMED_VALUES.get((key, value)) if isinstance(value, str) else None
    return None if new is None else f"{key}: {value} is called {new} now"
