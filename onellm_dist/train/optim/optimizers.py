"""Optimizers by name: `optim.name` picks one, and others ask it for its state keys.

An optimizer is one file in `train/optim/components/`. One of another package is registered by an
entry point of the group `onellm_dist.optimizers`, whose object is the class, or by a call of
`register_optimizer` before the recipe is read.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache

from onellm_dist.common.errors import UsageError
from onellm_dist.common.plugins import OPTIMIZERS, load_plugins
from onellm_dist.config.train_sections import OptimSection, ParameterRule
from onellm_dist.train.optim import components
from onellm_dist.train.optim.base import OptimizerComponent
from onellm_dist.train.optim.schedules import WSD, get_schedule

_REGISTERED: dict[str, type[OptimizerComponent]] = {}


def register_optimizer(component: type[OptimizerComponent]) -> type[OptimizerComponent]:
    """Make an optimizer known by its name; usable as a decorator of its class.

    Raises:
        UsageError: another optimizer has that name.
    """
    known = _REGISTERED.get(component.name)
    if known not in (None, component):
        raise UsageError(
            f"two optimizers are named {component.name}: {known} and {component}",
            "optim.name would be ambiguous.",
            "rename one of them.",
        )
    _REGISTERED[component.name] = component
    return component


def all_optimizers() -> dict[str, type[OptimizerComponent]]:
    """Name to class of every optimizer: those of the package, of entry points, and registered ones.

    Raises:
        UsageError: two have the same name, or an entry point cannot be imported.
    """
    _load_components()
    return dict(sorted(_REGISTERED.items()))


def make_optimizer(optim: OptimSection) -> OptimizerComponent:
    """The optimizer that a recipe names in `optim.name`, with its options checked.

    Raises:
        UsageError: there is no such optimizer, or its options are wrong.
    """
    known = all_optimizers()
    if optim.name not in known:
        raise UsageError(
            f"optim.name={optim.name}: unknown optimizer",
            "nothing can step the weights.",
            f"use one of: {', '.join(known)}.",
        )
    return known[optim.name](optim)


def check_optim(
    optim: OptimSection, rules: Sequence[ParameterRule] | None = (), steps: int | None = None
) -> None:
    """Refuse a wrong `optim` section; called before any rank starts.

    Args:
        optim: the recipe's `optim` section.
        rules: `train.parameters`, which may name schedules of their own. None: not known.
        steps: `train.steps`; default: not known yet.

    Raises:
        UsageError: an unknown optimizer or schedule, options that the optimizer does not have, or
            a decay that begins in the warm-up or never.
    """
    make_optimizer(optim)
    of_rules = (rule.schedule for rule in rules or ())
    schedules = {optim.schedule, *(name for name in of_rules if name is not None)}
    for name in sorted(schedules):
        get_schedule(name)
    if optim.decay_from is not None and WSD not in schedules and rules is not None:
        raise UsageError(
            f"optim.decay_from={optim.decay_from} is read by optim.schedule={WSD} alone",
            "the recipe would say something that does not hold.",
            f"set optim.schedule={WSD}, or remove optim.decay_from.",
        )
    _check_decay_start(optim, steps)


def _check_decay_start(optim: OptimSection, steps: int | None) -> None:
    first, end = optim.decay_from, optim.decay_steps or steps
    if first is None:
        return
    if first < optim.warmup_steps:
        raise UsageError(
            f"optim.decay_from={first} lies before the end of the warm-up "
            f"(optim.warmup_steps={optim.warmup_steps})",
            "the learning rate would jump there.",
            f"set optim.decay_from to {optim.warmup_steps} or more.",
        )
    if end is not None and first >= end:
        name = "train.steps" if optim.decay_steps is None else "optim.decay_steps"
        raise UsageError(
            f"optim.decay_from={first} is not below {name}={end}, where the schedule ends",
            "the learning rate would never fall.",
            f"set optim.decay_from below {end}, or optim.schedule=constant.",
        )


@cache
def _load_components() -> None:
    for info in pkgutil.iter_modules(components.__path__):
        module = importlib.import_module(f"{components.__name__}.{info.name}")
        register_optimizer(module.OPTIMIZER)
    for component in load_plugins(OPTIMIZERS).values():
        register_optimizer(component)
