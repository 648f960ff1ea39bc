"""What the ranks tell each other once a step: one small vector, summed over the ranks, read by the host once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onellm_dist.model.sequence_lengths import to_device_tensor
from onellm_dist.packed import PackedBatch
from onellm_dist.train.distributed import Distributed

LOSS, NOT_FINITE, SKIPPED_SAMPLES, STOP, WRITE_FAILED, SAVE = range(6)
FIXED = 6


@dataclass(frozen=True)
class StepValues:
    """The sums of a step over all ranks and micro-steps."""

    loss: float
    """Sum of weight x cross-entropy; over the plan's global_valid_tokens it is the step's loss."""
    nll: dict[str, float]
    """Mean cross-entropy by kind of sample, skipped_samples left out; kinds that the step did not have are missing."""
    not_finite: int
    """Micro-steps whose loss was not finite."""
    new_skipped_samples: int
    stop: bool
    """Some rank was asked to stop."""
    write_failed: bool = False
    """Some rank could not write its part of the checkpoint in flight."""
    save: bool = False
    """A checkpoint is due by the clock."""


class StepTotals:
    """Adds up on the device, without a host sync, until `reduce` and `read`.

    Args:
        kinds: the kinds of samples of the run, each the modalities of a sample in the order of its runs; the same on every rank.
    """

    def __init__(self, kinds: Sequence[tuple[str, ...]], device: torch.device) -> None:
        self._kinds = {kind: i for i, kind in enumerate(kinds)}
        self._sums = torch.zeros(FIXED + 2 * len(kinds), dtype=torch.float64, device=device)

    def add(
        self, batch: PackedBatch, loss: torch.Tensor, nll: torch.Tensor, sample_index: torch.Tensor
    ) -> None:
        """One micro-step: `batch` on the device, and what the engine returned for it."""
        loss = loss.detach().double()
        self._sums[LOSS] += loss
        self._sums[NOT_FINITE] += (~torch.isfinite(loss)).double()
        if batch.is_empty:
            return
        kind = to_device_tensor(
            [self._kinds[modalities] for modalities in batch.modalities], self._sums.device
        )
        weight = batch.weights.double()[sample_index]
        place = FIXED + kind[sample_index]
        self._sums.index_add_(0, place, nll.double() * weight)
        self._sums.index_add_(0, place + len(self._kinds), weight)

    def reduce(
        self,
        dist: Distributed,
        *,
        new_skipped_samples: int,
        stop: bool,
        write_failed: bool = False,
        save: bool = False,
    ) -> None:
        """Sum over the ranks. On a GPU this is queued, not waited for."""
        self._sums[WRITE_FAILED] = float(write_failed)
        self._sums[SAVE] = float(save)
        self._sums[SKIPPED_SAMPLES] = new_skipped_samples
        self._sums[STOP] = float(stop)
        dist.sum(self._sums)

    def read(self) -> StepValues:
        """The sums, on the host: the step's one wait for the device."""
        values = self._sums.tolist()
        nll, count = values[FIXED : FIXED + len(self._kinds)], values[FIXED + len(self._kinds) :]
        means = {
            "+".join(kind) or "text": nll[i] / count[i]
            for kind, i in self._kinds.items()
            if count[i] > 0
        }
        return StepValues(
            values[LOSS],
            means,
            int(values[NOT_FINITE]),
            int(values[SKIPPED_SAMPLES]),
            values[STOP] > 0,
            values[WRITE_FAILED] > 0,
            values[SAVE] > 0,
        )
