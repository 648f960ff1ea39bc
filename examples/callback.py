"""Watch a run, and add a metric to it, without touching onellm_dist.

    python examples/callback.py toy runs/watched

A recipe names such a class as `train.callbacks: ["callback:LossTrend"]`; a package can register it
under a name of its own by the entry point `onellm_dist.callbacks`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from onellm_dist import Callback, Metric, Trainer, load_config
from onellm_dist.train.records.metrics import StepMetrics

SMOOTHING = 0.9


class LossTrend(Callback):
    """Adds `loss_trend` to `metrics.jsonl`: an exponential average of the loss so far."""

    metrics = (
        Metric("loss_trend", "Exponential average of the loss before this step.", reduction="none"),
    )

    def __init__(self) -> None:
        self.trend: float | None = None

    def metrics_to_record(self, step: int) -> Mapping[str, Any]:
        return {} if self.trend is None else {"loss_trend": self.trend}

    def on_metrics(self, metrics: StepMetrics) -> None:
        loss = float(metrics["loss"])
        old = loss if self.trend is None else self.trend
        self.trend = SMOOTHING * old + (1 - SMOOTHING) * loss


def main(root: str, run_dir: str) -> None:
    """Train the toy model for three steps with the callback."""
    overrides = [
        f"data.root={root}",
        f"run.dir={run_dir}",
        "data.global_batch=8",
        "train.steps=3",
    ]
    config = load_config("toy/align_image", overrides)
    trend = LossTrend()
    Trainer.from_config(config, callbacks=[trend]).fit()
    print(f"loss trend after 3 steps: {trend.trend:.3f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
