"""The metrics of a run while it runs and afterwards, and the comparison of two runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.run_files import METRICS
from onellm_dist.testing.jsonl import read_json_lines

LOSS_TOLERANCE = 1e-4
"""Largest absolute difference between the losses of a step.

On another number of nodes, fp32 numbers are added in another order.
"""


@dataclass(frozen=True)
class RunComparison:
    """A disturbed run compared with the undisturbed one."""

    steps: int
    """Steps that the disturbed run has."""
    same_samples: bool
    """Whether every step has the same samples (`sample_digest`), and none is missing or twice."""
    largest_gap: float
    """Largest absolute difference between the losses of a step."""

    @property
    def same_losses(self) -> bool:
        """Whether the losses are the same within `LOSS_TOLERANCE`."""
        return self.same_samples and self.largest_gap <= LOSS_TOLERANCE


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl`, without one that is just being written."""
    return read_json_lines(run_dir / METRICS)


def compare_runs(run_dir: Path, undisturbed: Path) -> RunComparison:
    """Compare two runs of one recipe, step by step.

    Args:
        run_dir: the disturbed run.
        undisturbed: the run to compare it with.
    """
    lines, others = read_metrics(run_dir), read_metrics(undisturbed)
    samples = [(line["step"], line["sample_digest"]) for line in lines]
    same = samples == [(line["step"], line["sample_digest"]) for line in others]
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(lines, others, strict=False)]
    return RunComparison(len(lines), same, max(gaps, default=float("inf")))
