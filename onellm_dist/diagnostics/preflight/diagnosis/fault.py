"""One fault that the preflight found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    state: Literal["warn", "fail"]
    node: str
    """The node that has it; "" if it cannot be attributed to one."""
    what: str
    remedy: str
    exclude: bool = False
    """Whether the node itself is the cause: without it the run could start."""
