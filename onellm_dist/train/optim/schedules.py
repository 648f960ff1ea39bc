"""Learning rates: a linear warm-up, then a schedule by name (paper, appendix C.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import OptimSection

Schedule = Callable[[OptimSection, float], float]
"""(`optim` section, share of the way from the end of the warm-up to the end of the decay, 0 to 1)
-> learning rate."""

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


def compute_learning_rate(step: int, optim: OptimSection, total_steps: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        step: index of the optimizer step; the first is 0, and of w warm-up steps it has 1/w of the
            rate, not zero.
        optim: the recipe's `optim` section.
        total_steps: where the decay ends unless `optim.decay_steps` says otherwise.

    Raises:
        UsageError: there is no schedule of the name.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    end = optim.decay_steps or total_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, end - optim.warmup_steps))
    return get_schedule(optim.schedule)(optim, progress)


@register_schedule("cosine")
def compute_cosine_rate(optim: OptimSection, progress: float) -> float:
    """Fall from `optim.lr` to `optim.min_lr` along half a cosine."""
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * share


@register_schedule("constant")
def compute_constant_rate(optim: OptimSection, progress: float) -> float:
    """Stay at `optim.lr`."""
    return optim.lr
