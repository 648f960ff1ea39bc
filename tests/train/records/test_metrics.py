"""Metrics: written down once, reduced as they say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from onellm_dist.train.records.metrics import METRICS, Metric, MetricSet, StepMetrics
from onellm_dist.train.totals import StepTotals


def test_every_metric_is_described_and_has_a_place_in_the_line() -> None:
    assert all(metric.meaning.endswith(".") for metric in METRICS)
    line = StepMetrics(MetricSet(), 3).build_line()
    assert list(line) == [m.name for m in METRICS]
    assert line["step"] == 3 and line["loss"] is None


def test_unknown_and_repeated_names_are_refused() -> None:
    metrics = MetricSet()
    with pytest.raises(KeyError, match="loss_rate is not a metric"):
        StepMetrics(metrics, 0).record("loss_rate", 1.0)
    with pytest.raises(ValueError, match="two metrics are named loss"):
        metrics.add([Metric("loss", "Another one.")])
    metrics.add(METRICS)


class Ranks:
    """Adds the vectors of ranks that run one after the other."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.vectors: list[torch.Tensor] = []

    def reduce(self, rank: int, known: list[Metric], **given: Any) -> StepTotals:
        dist: Any = SimpleNamespace(
            rank=rank,
            world_size=self.world_size,
            device=torch.device("cpu"),
            sum=self.vectors.append,
        )
        totals = StepTotals([("image",), ()], dist, known)
        totals.reduce(**given)
        return totals


def test_each_reduction_over_three_ranks() -> None:
    metrics = [Metric(f"x_{r}", "A number.", reduction=r) for r in ("sum", "mean", "max")]
    metrics.append(Metric("unused", "A number.", reduction="max"))
    ranks = Ranks(3)
    values = [-5.0, -1.0, None]
    totals = [
        ranks.reduce(
            rank,
            metrics,
            metrics={} if x is None else {"x_sum": x, "x_mean": x, "x_max": x},
            stop=rank == 1,
            new_skipped_samples=rank,
        )
        for rank, x in enumerate(values)
    ]
    summed = torch.stack(ranks.vectors).sum(0)
    for own in totals:
        own._sums.copy_(summed)
        found = own.read()
        assert found.metrics == {"x_sum": -6.0, "x_mean": -3.0, "x_max": -1.0}, (
            "a rank that says nothing does not count"
        )
        assert found.stop and not found.checkpoint_due and found.new_skipped_samples == 3
        assert found.nll == {}
