"""The values of one optimizer step, and its metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from onellm_dist.common.errors import OneLLMError
from onellm_dist.data.micro_batch import StepPlan
from onellm_dist.data.plan import Plan
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import GradNorms
from onellm_dist.train.records.metrics import MetricSet, StepMetrics
from onellm_dist.train.stability.monitor import Anomaly
from onellm_dist.train.stability.offending_samples import MicroBatchLosses
from onellm_dist.train.step.flops import FlopCounter, peak_flops
from onellm_dist.train.totals import StepTotals, StepValues


@dataclass
class LocalPass:
    """What one rank did in a step before the ranks reduce it."""

    totals: StepTotals
    losses: list[MicroBatchLosses] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    data_wait_seconds: float = 0.0
    """Time spent waiting for the loader."""
    sample_digest: str | None = None
    """Digest of the step's samples, on rank 0 (`work_ahead`)."""

    @property
    def skipped_samples(self) -> dict[str, str]:
        """Sample id -> reason, of samples that could not be read."""
        return {
            part.batch.sample_ids[i]: reason
            for part in self.losses
            for i, reason in part.batch.skipped_samples.items()
        }

    def count_modalities(self, sample_ids: Collection[str]) -> Counter[str]:
        """Modality -> how many of the given samples have it."""
        return Counter(
            name
            for part in self.losses
            for sample, modalities in zip(part.batch.sample_ids, part.batch.modalities, strict=True)
            if sample in sample_ids
            for name in dict.fromkeys(modalities) or ("text",)
        )


@dataclass(frozen=True)
class Decision:
    """What becomes of a step; the same on every rank."""

    loss: float
    norms: GradNorms
    lr: float
    """Learning rate of the step by the `optim` section."""
    rates: list[float]
    """Learning rate of each parameter group."""
    anomaly: Anomaly | None
    """Why the step must not be applied."""


class StepMeter:
    """Collects the metrics of each step.

    Args:
        metrics: the metrics of the run.
        flops: the work of a step, by its plan.
        dist: the ranks.
    """

    def __init__(self, metrics: MetricSet, flops: FlopCounter, dist: Distributed) -> None:
        self.metrics = metrics
        self.peak_flops = peak_flops(dist.device)
        self._flops = flops
        self._dist = dist
        self._recorded: dict[str, Any] = {}

    def describe_mfu(self) -> str:
        """The formula of the MFU with the numbers of this run, for people."""
        return self._flops.describe(self._dist.world_size, self.peak_flops)

    def record(self, name: str, value: Any) -> None:
        """Record a metric of the step under way.

        Raises:
            KeyError: no metric has this name.
        """
        self._recorded[self.metrics[name].name] = value

    def get_reduced(self) -> dict[str, float]:
        """Recorded metrics that take part in the reduction, on this rank."""
        names = {metric.name for metric in self.metrics.reduced}
        return {name: value for name, value in self._recorded.items() if name in names}

    def measure(
        self,
        plan: StepPlan,
        values: StepValues,
        decision: Decision,
        local: LocalPass,
        *,
        applied: bool,
    ) -> StepMetrics:
        """Measure a step that was applied or skipped just now.

        Args:
            plan: the plan of the step.
            values: its reduced values.
            decision: what was decided about it.
            local: what this rank did.
            applied: whether it was applied.
        """
        metrics = StepMetrics(self.metrics, plan.step)
        metrics.seconds = time.perf_counter() - local.started
        metrics.data_wait_seconds = local.data_wait_seconds
        metrics.rank_seconds = values.rank_seconds
        work, seconds = self._flops.count(plan), metrics.seconds
        recorded = {
            "loss": decision.loss,
            "loss_by_modality": values.nll,
            "lr": decision.lr,
            "grad_norm": decision.norms.total,
            "applied": applied,
            "samples": work.samples,
            "global_valid_tokens": work.global_valid_tokens,
            "tokens": work.tokens,
            "padding_fraction": work.padding_fraction,
            "tokens_per_second": work.tokens / seconds,
            "data_wait_fraction": min(1.0, metrics.data_wait_seconds / seconds),
            "mfu": self._compute_mfu(work.flops / seconds),
            "seconds": seconds,
            "pack_balance": work.balance,
            "grad_norm_by_part": decision.norms.by_part,
            **self._recorded,
            **values.metrics,
            **values.rewards,
        }
        self._recorded.clear()
        for name, value in recorded.items():
            metrics.record(name, value)
        return metrics

    def _compute_mfu(self, flops_per_second: float) -> float | None:
        if self.peak_flops is None:
            return None
        return flops_per_second / (self._dist.world_size * self.peak_flops)


def work_ahead(plan: Plan, step: int, steps: int, dist: Distributed) -> str | None:
    """Do what the host can do of a step's end, and of the next step, while the device computes.

    Args:
        plan: the run's plan; it keeps that of the next step.
        step: the step whose work is queued on the device.
        steps: steps of the run.
        dist: the ranks.

    Returns:
        The digest of the step's samples on rank 0, which records it; None elsewhere.
    """
    if step + 1 < steps:
        with suppress(OneLLMError):  # the next step will raise it
            plan.step(step + 1, dist.world_size)
    return plan.digest(step) if dist.is_rank_zero else None


def compare_plans(plan: StepPlan, dist: Distributed) -> None:
    """Check that every rank has made the same plan. All ranks call it together.

    Raises:
        OneLLMError: they differ; the ranks would wait for each other in a collective.
    """
    digests = dist.gather(plan.digest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise OneLLMError(
            f"step {plan.step}: ranks {different} have another plan than rank 0",
            "they would run different micro-batches and wait for each other forever.",
            "make sure that all nodes see the same shards, token counts and version of "
            "onellm_dist.",
        )
