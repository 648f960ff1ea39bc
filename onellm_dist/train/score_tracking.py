"""Scores of a checkpoint on benchmarks, for TensorBoard and trackers, when its run has ended."""

from __future__ import annotations

from collections.abc import Mapping

from onellm_dist.common.run_files import TENSORBOARD
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.callbacks.trackers import Trackers
from onellm_dist.train.records.events import Events


def track_scores(config: RunConfig, charts: Mapping[str, float], step: int) -> None:
    """Send scores to TensorBoard and to the trackers of the recipe.

    Args:
        config: the recipe.
        charts: name -> score.
        step: index of the last step of the checkpoint.
    """
    from torch.utils.tensorboard import SummaryWriter

    run_dir = config.run.dir
    with SummaryWriter(str(run_dir / TENSORBOARD)) as board:
        for name, value in charts.items():
            board.add_scalar(name, value, step)
    events = Events(run_dir, enabled=True, repair=False)
    recipe = config.model_dump(mode="json", by_alias=True)
    trackers = Trackers(config.track, run_dir, recipe, events)
    trackers.log(charts, step)
    trackers.close()
