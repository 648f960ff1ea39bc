"""The result of one check of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "warn", "fail"]
GIB = 1 << 30


@dataclass(frozen=True)
class CheckResult:
    """One line of the report of `onellm doctor`."""

    part: str
    """What the check belongs to: `packages`, `devices`, `host`, ..."""
    name: str
    state: State
    """`fail` would break training (exit code 1), `warn` may slow or hinder it, `note` informs."""
    detail: str
    remedy: str = ""
    """What to do about a `warn` or `fail`."""
