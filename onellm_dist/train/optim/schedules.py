"""Learning rates: a linear warm-up, then a schedule by name (paper, appendix C.1).

The rate of a step is a function of the recipe and the step alone. A run that is resumed with
another `train.steps` or `optim.decay_from` therefore has the rates of a run that was planned so
from the start, from that step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onellm_dist.common.errors import UsageError
from onellm_dist.config.train_sections import OptimSection

Schedule = Callable[[OptimSection, int, int], float]
"""(`optim` section, step after the warm-up, step at which the schedule ends) -> learning rate."""
WSD = "wsd"
DECAY_SHARE = 10
"""One part in this many of a WSD schedule decays by default (arXiv 2404.06395, section 4)."""

_SCHEDULES: dict[str, Schedule] = {}


def register_schedule(name: str) -> Callable[[Schedule], Schedule]:
    """Make the decorated function known as `optim.schedule=name`."""

    def register(schedule: Schedule) -> Schedule:
        _SCHEDULES[name] = schedule
        return schedule

    return register


def get_schedule(name: str) -> Schedule:
    """The schedule that a recipe names in `optim.schedule`.

    Raises:
        UsageError: there is no such schedule.
    """
    if name not in _SCHEDULES:
        raise UsageError(
            f"optim.schedule={name}: unknown schedule",
            "no step would have a learning rate.",
            f"use one of: {', '.join(sorted(_SCHEDULES))}.",
        )
    return _SCHEDULES[name]


def compute_learning_rate(
    step: int, optim: OptimSection, total_steps: int, schedule: str | None = None
) -> float:
    """The learning rate of an optimizer step.

    Args:
        step: index of the optimizer step; the first is 0, and of w warm-up steps it has 1/w of the
            rate, not zero.
        optim: the recipe's `optim` section.
        total_steps: where the decay ends unless `optim.decay_steps` says otherwise.
        schedule: name of the schedule; default: `optim.schedule`.

    Raises:
        UsageError: there is no schedule of the name.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    end = optim.decay_steps or total_steps
    return get_schedule(schedule or optim.schedule)(optim, step, end)


def compute_progress(step: int, first: int, end: int) -> float:
    """Share of the way from step `first` to step `end`, 0 to 1."""
    return min(1.0, (step - first) / max(1, end - first))


@register_schedule("cosine")
def compute_cosine_rate(optim: OptimSection, step: int, end: int) -> float:
    """Fall from `optim.lr` to `optim.min_lr` along half a cosine."""
    progress = compute_progress(step, optim.warmup_steps, end)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * share


@register_schedule("linear")
def compute_linear_rate(optim: OptimSection, step: int, end: int) -> float:
    """Fall from `optim.lr` to `optim.min_lr` along a line."""
    return _fall(optim, compute_progress(step, optim.warmup_steps, end))


@register_schedule("constant")
def compute_constant_rate(optim: OptimSection, step: int, end: int) -> float:
    """Stay at `optim.lr`."""
    return optim.lr


@register_schedule(WSD)
def compute_wsd_rate(optim: OptimSection, step: int, end: int) -> float:
    """Stay at `optim.lr`, then fall to `optim.min_lr` along a line (warm-up, stable, decay)."""
    first = get_decay_start(optim, end)
    return optim.lr if step < first else _fall(optim, compute_progress(step, first, end))


def get_decay_start(optim: OptimSection, end: int) -> int:
    """The step from which a WSD schedule that ends at step `end` decays."""
    if optim.decay_from is not None:
        return optim.decay_from
    return end - max(1, (end - optim.warmup_steps) // DECAY_SHARE)


def _fall(optim: OptimSection, progress: float) -> float:
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 - progress)
