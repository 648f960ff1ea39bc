"""Which samples a step went wrong over: by the cross-entropy of each, which every rank has at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from onellm_dist.packed import PackedBatch
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.stability.checks import SIGMA, Verdict

STANDS_OUT = 6.0
"""Robust deviations, among the samples of the step, above which a sample is to blame for a leap."""
NAMED = 32
"""Samples that an event names; the ledger has all that were marked."""


@dataclass(frozen=True)
class Suspect:
    """A sample of the step in question."""

    rank: int
    micro_batch: int
    sample: str
    modality: str
    """`image`, `video+audio`, `text`, as in `loss_by_modality`."""
    nll: float | None
    """Mean cross-entropy of its supervised tokens; None where that is not finite."""

    def __str__(self) -> str:
        how = "not finite" if self.nll is None else f"cross-entropy {self.nll:.3g}"
        return f"{self.sample} ({self.modality}, rank {self.rank}, {how})"


@dataclass(frozen=True)
class Part:
    """What a micro-step left: the batch without its media, and the cross-entropy of its supervised tokens."""

    batch: PackedBatch
    loss: torch.Tensor
    nll: torch.Tensor
    sample_index: torch.Tensor


def find_culprits(parts: Sequence[Part], verdict: Verdict, dist: Distributed) -> list[Suspect]:
    """The samples to blame, the worst first; every sample of the step where none stands out. Called by all ranks; the same on each."""
    everyone = [suspect for own in dist.gather(_suspects(parts, dist.rank)) for suspect in own]
    broken = [s for s in everyone if s.nll is None]
    if broken:
        return broken
    if verdict.kind == "gradient_not_finite":  # no loss tells which
        return everyone
    outliers = _outliers(everyone)
    return sorted(outliers or everyone, key=lambda s: -(s.nll or 0.0))


def describe(culprits: Sequence[Suspect]) -> dict[str, Any]:
    """Fields of an event: `samples` (the first NAMED), `samples_total`."""
    return {"samples": [asdict(s) for s in culprits[:NAMED]], "samples_total": len(culprits)}


def say(culprits: Sequence[Suspect]) -> str:
    """For the terminal: three of them."""
    named = "; ".join(str(s) for s in culprits[:3])
    return named + (f"; and {len(culprits) - 3} more" if len(culprits) > 3 else "")


def _suspects(parts: Sequence[Part], rank: int) -> list[Suspect]:
    """This rank's samples of the step that count in the loss. A micro-step whose loss alone is not finite suspects all of its samples."""
    found = []
    for number, part in enumerate(parts):
        if part.batch.is_empty:
            continue
        samples = len(part.batch.text_token_counts)
        sums = torch.zeros(samples, dtype=torch.float64, device=part.nll.device).index_add_(
            0, part.sample_index, part.nll.double()
        )
        counts = torch.bincount(part.sample_index, minlength=samples)
        means, weights = (sums / counts.clamp_min(1)).tolist(), part.batch.weights.tolist()
        own = [i for i in range(samples) if weights[i] != 0 and i not in part.batch.skipped_samples]
        blind = not math.isfinite(part.loss.item()) and all(math.isfinite(means[i]) for i in own)
        for i in own:
            nll = None if blind or not math.isfinite(means[i]) else means[i]
            found.append(
                Suspect(
                    rank,
                    number,
                    part.batch.sample_ids[i],
                    "+".join(part.batch.modalities[i]) or "text",
                    nll,
                )
            )
    return found


def _outliers(everyone: Sequence[Suspect]) -> list[Suspect]:
    """Samples whose cross-entropy stands out among those of the step."""
    values = sorted(s.nll for s in everyone if s.nll is not None)
    if not values:
        return []
    centre = values[len(values) // 2] if len(values) % 2 else values[len(values) // 2 - 1]
    gaps = sorted(abs(v - centre) for v in values)
    # The lower middle of both: with four samples, one of them bad, the upper middle would be half the bad one's own gap.
    scatter = max(SIGMA * gaps[(len(gaps) - 1) // 2], 0.05 * abs(centre), 1e-6)
    return [s for s in everyone if s.nll is not None and (s.nll - centre) / scatter > STANDS_OUT]
