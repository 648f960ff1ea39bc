"""Which samples a step went wrong over, by the losses that every rank has of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any

import torch

from onellm_dist.packed import PackedBatch
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.stability.monitor import SIGMA, Anomaly

OUTLIER = 6.0
"""Robust standard deviations among the samples of a step above which a sample offends."""
NAMED = 32
"""Samples that an event names; the sample log has all that were excluded."""


@dataclass(frozen=True)
class OffendingSample:
    """A sample over which a step may have gone wrong."""

    rank: int
    micro_batch: int
    sample: str
    modality: str
    """Modality combination as in `loss_by_modality`: `image`, `video+audio`, `text`."""
    nll: float | None
    """Mean loss of its supervised tokens, or of the pair; None where that is not finite."""

    def __str__(self) -> str:
        value = "not finite" if self.nll is None else f"loss {self.nll:.3g}"
        return f"{self.sample} ({self.modality}, rank {self.rank}, {value})"


@dataclass(frozen=True)
class MicroBatchLosses:
    """What a micro-batch left behind: the batch without its media, and its losses."""

    batch: PackedBatch
    loss: torch.Tensor
    """[] summed loss."""
    nll: torch.Tensor
    """[N] loss of the supervised tokens, or of the pairs."""
    sample_index: torch.Tensor
    """[N] the sample of each of them."""


def find_offending_samples(
    losses: Sequence[MicroBatchLosses], anomaly: Anomaly, dist: Distributed
) -> list[OffendingSample]:
    """The samples to which an anomaly points, the worst first. Called by all ranks; equal on each.

    Args:
        losses: this rank's micro-batches of the step.
        anomaly: what was wrong.
        dist: the ranks.

    Returns:
        Samples whose loss is not finite, else outliers, else every sample of the step.
    """
    own = _list_samples(losses, dist.rank)
    everyone = [sample for part in dist.gather(own) for sample in part]
    broken = [s for s in everyone if s.nll is None]
    if broken:
        return broken
    if anomaly.kind == "gradient_not_finite":  # no loss shows which
        return everyone
    outliers = _find_outliers(everyone)
    return sorted(outliers or everyone, key=lambda s: -(s.nll or 0.0))


def to_event_fields(offending: Sequence[OffendingSample]) -> dict[str, Any]:
    """Event fields `offending_samples` (the first `NAMED`) and `offending_samples_total`."""
    return {
        "offending_samples": [asdict(s) for s in offending[:NAMED]],
        "offending_samples_total": len(offending),
    }


def format_samples(offending: Sequence[OffendingSample]) -> str:
    """Three of the samples, for the terminal."""
    named = "; ".join(str(s) for s in offending[:3])
    return named + (f"; and {len(offending) - 3} more" if len(offending) > 3 else "")


def _list_samples(losses: Sequence[MicroBatchLosses], rank: int) -> list[OffendingSample]:
    """This rank's samples that count in the loss of the step.

    Where only the summed loss of a micro-batch is not finite, all of its samples are listed as not
    finite.
    """
    found = []
    for number, part in enumerate(losses):
        batch = part.batch
        if batch.is_empty:
            continue
        count = len(batch.text_token_counts)
        sums = torch.zeros(count, dtype=torch.float64, device=part.nll.device).index_add_(
            0, part.sample_index, part.nll.double()
        )
        tokens = torch.bincount(part.sample_index, minlength=count)
        means = (sums / tokens.clamp_min(1)).tolist()
        weights = batch.weights.tolist()
        counted = [i for i in range(count) if weights[i] != 0 and i not in batch.skipped_samples]
        finite = all(math.isfinite(means[i]) for i in counted)
        unknown = finite and not math.isfinite(part.loss.item())
        for i in counted:
            found.append(
                OffendingSample(
                    rank=rank,
                    micro_batch=number,
                    sample=batch.sample_ids[i],
                    modality="+".join(dict.fromkeys(batch.modalities[i])) or "text",
                    nll=None if unknown or not math.isfinite(means[i]) else means[i],
                )
            )
    return found


def _find_outliers(everyone: Sequence[OffendingSample]) -> list[OffendingSample]:
    """Samples whose loss stands out among those of the step."""
    values = [s.nll for s in everyone if s.nll is not None]
    if not values:
        return []
    # Lower medians: with four samples, one of them bad, the upper middle of the gaps would be half
    # the bad sample's own gap.
    centre = median_low(values)
    gaps = [abs(v - centre) for v in values]
    scatter = max(SIGMA * median_low(gaps), 0.05 * abs(centre), 1e-6)
    return [s for s in everyone if s.nll is not None and (s.nll - centre) / scatter > OUTLIER]
