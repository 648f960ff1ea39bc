"""A finding: one sentence for people about a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weight = Literal["bad", "warn", "note"]
MIN_STEPS = 5
"""Number of steps from which rates and medians mean something."""


@dataclass(frozen=True)
class Finding:
    """One or two sentences: what was seen, and what to do about it."""

    weight: Weight
    text: str
