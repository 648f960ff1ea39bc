"""What a run's directory tells of it while it runs and afterwards, and the comparison of two runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOSS_TOLERANCE = 1e-4
"""Largest absolute difference of a step's loss: other node counts add fp32 numbers in another order."""


@dataclass(frozen=True)
class Comparison:
    """A run against an undisturbed one."""

    steps: int
    """Steps that the run has."""
    stream: bool
    """The same samples at every step (`sample_digest`), no step twice, none missing."""
    largest_gap: float
    """Largest absolute difference of the losses."""

    @property
    def losses(self) -> bool:
        """Whether the losses are the same within `LOSS_TOLERANCE`."""
        return self.stream and self.largest_gap <= LOSS_TOLERANCE


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, without one that is being written just now."""
    try:
        text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def compare(run_dir: Path, undisturbed: Path) -> Comparison:
    """Compare two runs of one recipe, step by step."""
    ours, theirs = read_metrics(run_dir), read_metrics(undisturbed)
    stream = [(m["step"], m["sample_digest"]) for m in ours] == [
        (m["step"], m["sample_digest"]) for m in theirs
    ]
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=False)]
    return Comparison(len(ours), stream, max(gaps, default=float("inf")))
