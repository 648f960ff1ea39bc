"""The one reduction of a step: a small vector, summed over the ranks, that the host reads once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from onellm_dist.model.sequence_lengths import to_device_tensor
from onellm_dist.packed import PackedBatch
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.records.metrics import Metric

LOSS = 0
NOT_FINITE = 1
SIGNALS = ("new_skipped_samples", "stop_requests", "checkpoint_failures", "checkpoint_requests")
"""What the trainer itself sums over ranks to decide about a step."""
FIXED = 2 + len(SIGNALS)
RANK_SECONDS = ("data", "compute", "host")
"""What is shared of the time of each rank; every rank has an element of its own for each."""


REWARDS = ("rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy")
"""Means over the pairs of a step, by the names of their metrics."""


@dataclass(frozen=True)
class StepValues:
    """The reduced values of a step.

    Attributes:
        loss: sum of weight x loss over all ranks; divided by the plan's `loss_count` it is the
            loss of the step.
        nll: mean cross-entropy (of pairs: mean loss) by modality combination; skipped samples do
            not count, and combinations that the step did not have are missing.
        not_finite: micro-batches whose loss was not finite.
        new_skipped_samples: samples that could not be read and were not known before.
        stop: whether some rank was asked to stop.
        checkpoint_failed: whether some rank could not write its part of the pending checkpoint.
        checkpoint_due: whether a checkpoint is due by rank 0's clock.
        unreadable: modality to samples that could not be read and were not known before.
        metrics: metrics of callbacks, by name.
        rank_seconds: kind of time to the seconds of each rank; {} in a step that was not measured.
        rewards: REWARDS of the pairs that count; {} if there was none.
    """

    loss: float
    nll: dict[str, float]
    not_finite: int
    new_skipped_samples: int
    stop: bool = False
    checkpoint_failed: bool = False
    checkpoint_due: bool = False
    unreadable: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    rank_seconds: dict[str, list[float]] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)


class StepTotals:
    """Sums up on the device, without a host sync, until `reduce` and `read`.

    Args:
        combinations: the modality combinations of the run, each the modalities of a sample in span
            order; the same on every rank.
        dist: the ranks.
        metrics: metrics that take part in the reduction; the same on every rank.
    """

    def __init__(
        self,
        combinations: Sequence[tuple[str, ...]],
        dist: Distributed,
        metrics: Sequence[Metric] = (),
    ) -> None:
        self._combinations = {names: i for i, names in enumerate(combinations)}
        self._places = {frozenset(names): i for i, names in enumerate(combinations)}
        self._dist = dist
        self._metrics = metrics
        self._modalities = sorted({name for c in combinations for name in c or ("text",)})
        self._first_unreadable = FIXED + 2 * len(combinations)
        self._first_metric = self._first_unreadable + len(self._modalities)
        self._first_rank = self._first_metric + sum(
            self._count_elements(metric) for metric in metrics
        )
        self._first_reward = self._first_rank + len(RANK_SECONDS) * dist.world_size
        size = self._first_reward + len(REWARDS) + 1  # and the number of pairs
        self._sums = torch.zeros(size, dtype=torch.float64, device=dist.device)

    def _count_elements(self, metric: Metric) -> int:
        """Elements that a metric takes: a maximum needs one per rank, so that a sum can give it."""
        return {"sum": 1, "mean": 2, "max": 2 * self._dist.world_size}[metric.reduction]

    def add(
        self,
        batch: PackedBatch,
        loss: torch.Tensor,
        nll: torch.Tensor,
        sample_index: torch.Tensor,
        rewards: torch.Tensor | None = None,
    ) -> None:
        """Add one micro-batch.

        Args:
            batch: the micro-batch, on the device.
            loss: [] its summed loss.
            nll: [N] cross-entropy of its supervised tokens; of pairs, the loss of each.
            sample_index: [N] the sample of each.
            rewards: of pairs, [N, 2] the rewards of the chosen and the rejected answer.
        """
        loss = loss.detach().double()
        self._sums[LOSS] += loss
        self._sums[NOT_FINITE] += (~torch.isfinite(loss)).double()
        if batch.is_empty:
            return
        combination = to_device_tensor(
            [self._places[frozenset(spans)] for spans in batch.modalities], self._sums.device
        )
        weight = batch.weights.double()[sample_index]
        place = FIXED + combination[sample_index]
        self._sums.index_add_(0, place, nll.double() * weight)
        self._sums.index_add_(0, place + len(self._combinations), weight)
        if rewards is not None:
            margin = (rewards[:, 0] - rewards[:, 1]).double()
            columns = [
                *rewards.double().unbind(1),
                margin,
                (margin > 0).double(),
                torch.ones_like(margin),
            ]
            self._sums[self._first_reward :] += torch.stack(columns) @ weight

    def reduce(
        self,
        *,
        new_skipped_samples: int = 0,
        stop: bool = False,
        checkpoint_failed: bool = False,
        checkpoint_due: bool = False,
        unreadable: Mapping[str, int] | None = None,
        metrics: Mapping[str, float] | None = None,
        rank_seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Sum over the ranks. On a GPU this is queued, not waited for.

        Args:
            new_skipped_samples: see `StepValues`; this rank's.
            stop: see `StepValues`; this rank's.
            checkpoint_failed: see `StepValues`; this rank's.
            checkpoint_due: see `StepValues`; this rank's.
            unreadable: see `StepValues`; this rank's.
            metrics: this rank's values of the metrics; missing ones do not count.
            rank_seconds: see `StepValues`; this rank's.
        """
        signals = (new_skipped_samples, stop, checkpoint_failed, checkpoint_due)
        for i, signal in enumerate(signals, FIXED - len(SIGNALS)):
            self._sums[i] = float(signal)
        for i, name in enumerate(self._modalities, self._first_unreadable):
            self._sums[i] = float((unreadable or {}).get(name, 0))
        place = self._first_metric
        given = metrics or {}
        for metric in self._metrics:
            if metric.name in given:
                value = float(given[metric.name])
                at = place + (2 * self._dist.rank if metric.reduction == "max" else 0)
                self._sums[at] = value
                if metric.reduction != "sum":
                    self._sums[at + 1] = 1.0
            place += self._count_elements(metric)
        for i, kind in enumerate(RANK_SECONDS):
            at = self._first_rank + i * self._dist.world_size + self._dist.rank
            self._sums[at] = (rank_seconds or {}).get(kind, 0.0)
        self._dist.sum(self._sums)

    def read(self) -> StepValues:
        """The sums, on the host: the step's one wait for the device."""
        values = self._sums.tolist()
        count = len(self._combinations)
        nll, weight = values[FIXED : FIXED + count], values[FIXED + count : self._first_unreadable]
        means = {
            "+".join(names) or "text": nll[i] / weight[i]
            for names, i in self._combinations.items()
            if weight[i] > 0
        }
        skipped, stop, failed, due = values[FIXED - len(SIGNALS) : FIXED]
        return StepValues(
            loss=values[LOSS],
            nll=means,
            not_finite=int(values[NOT_FINITE]),
            new_skipped_samples=int(skipped),
            stop=stop > 0,
            checkpoint_failed=failed > 0,
            checkpoint_due=due > 0,
            unreadable={
                name: int(values[i])
                for i, name in enumerate(self._modalities, self._first_unreadable)
                if values[i]
            },
            metrics=self._read_metrics(values),
            rank_seconds=self._read_ranks(values),
            rewards=self._read_rewards(values),
        )

    def _read_rewards(self, values: Sequence[float]) -> dict[str, float]:
        *sums, pairs = values[self._first_reward :]
        return {n: x / pairs for n, x in zip(REWARDS, sums, strict=True)} if pairs else {}

    def _read_ranks(self, values: Sequence[float]) -> dict[str, list[float]]:
        count = self._dist.world_size
        found = {
            kind: list(values[self._first_rank + i * count :][:count])
            for i, kind in enumerate(RANK_SECONDS)
        }
        return found if any(map(any, found.values())) else {}

    def _read_metrics(self, values: Sequence[float]) -> dict[str, float]:
        found: dict[str, float] = {}
        place = self._first_metric
        for metric in self._metrics:
            own = values[place : place + self._count_elements(metric)]
            place += self._count_elements(metric)
            if metric.reduction == "sum":
                found[metric.name] = own[0]
            elif metric.reduction == "mean" and own[1]:
                found[metric.name] = own[0] / own[1]
            elif metric.reduction == "max" and any(own[1::2]):
                found[metric.name] = max(
                    x for x, there in zip(own[::2], own[1::2], strict=True) if there
                )
        return found
