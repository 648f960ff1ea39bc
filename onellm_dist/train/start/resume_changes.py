"""Changed hyper-parameters at a resume: refused if no step is left, else said and recorded."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.train_sections import OptimSection, TrainSection
from onellm_dist.train.checkpoint.folder import get_steps_done
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.optim.groups import compute_group_rates
from onellm_dist.train.optim.rules import ParameterRate, plan_parameters
from onellm_dist.train.records.config_changes import (
    KeyChange,
    append_history,
    find_changes,
    read_earlier_recipe,
)
from onellm_dist.train.records.events import Events

STEPS = "train.steps"
FROZEN = "engine.frozen"
EPOCH_KEYS = ("data.global_batch", "data.mixture")
"""What decides how many steps an epoch has."""
JUMP = 1.1
"""A learning rate that changes by more than this factor at a resume jumps."""


@dataclass(frozen=True)
class TrainedParameters:
    """What a start trains, and how."""

    model: nn.Module
    modalities: Collection[str]
    """Modalities of the mixture."""
    rates: Mapping[str, ParameterRate]
    """Name of each parameter that trains to how."""


def check_steps_left(config: RunConfig, target: ResumeTarget, manifest: Mapping[str, Any]) -> None:
    """Refuse a run that is over before it begins.

    A run of exactly the steps that are done ends at once, and exports its model again.

    Raises:
        UsageError: `train.steps` is below the steps that the checkpoint contains.
    """
    if target.folder is None:
        return
    done, steps = get_steps_done(dict(manifest)), config.train.steps
    if steps < done:
        raise UsageError(
            f"train.steps={steps}, and the checkpoint {target.folder} has "
            f"{format_count(done, 'step')} done",
            f"no step is left to train, and a model of {format_count(done, 'step')} is not one "
            f"of {steps}.",
            f"raise train.steps above {done}; or resume an earlier checkpoint "
            "(checkpoint.resume=.../step-...) in another run.dir; `onellm convert run` writes the "
            "model of a checkpoint.",
        )


def check_epochs_stay(config: RunConfig, target: ResumeTarget) -> None:
    """Refuse to count the epochs of a run anew: steps that are done had other samples.

    Raises:
        UsageError: the recipe says `train.epochs`, and the resume changes batch or mixture so that
            they are another number of steps.
    """
    if target.folder is None or config.train.counted_from is None:
        return
    earlier = read_earlier_recipe(config.run.dir, target.folder)
    changes = [] if earlier is None else find_changes(earlier, config)
    keys = [change.key for change in changes]
    changed = [key for key in keys if key in EPOCH_KEYS]
    if changed and STEPS in keys:
        raise UsageError(
            f"train.epochs={config.train.counted_from:g}, and this resume changes "
            f"{' and '.join(changed)}",
            "epochs are counted as if all steps had the new values, and those that are done had "
            "not.",
            f"set train.steps in place of train.epochs (by the new values alone it would be "
            f"{config.train.steps}).",
        )


def find_resume_changes(
    config: RunConfig, target: ResumeTarget, *, frozen_decided: bool
) -> tuple[list[KeyChange], Any]:
    """The keys that this resume changes, and the recipe before.

    Rank 0 calls it before the directory is that of this start.

    Args:
        config: the recipe.
        target: what is resumed.
        frozen_decided: whether this start has decided `engine.frozen`, so that a change of it is
            nobody's.
    """
    if target.folder is None:
        return [], None
    earlier = read_earlier_recipe(config.run.dir, target.folder)
    if earlier is None:
        return [], None
    changes = find_changes(earlier, config)
    if frozen_decided or config.engine.frozen == "auto":
        changes = [change for change in changes if change.key != FROZEN]
    return changes, earlier


def write_changes(
    events: Events,
    config: RunConfig,
    changes: list[KeyChange],
    earlier: Mapping[str, Any] | None,
    first_step: int,
    trained: TrainedParameters,
) -> None:
    """Tell which keys changed: in the events, on the terminal and in the history. Rank 0 calls it.

    Args:
        events: where they are recorded.
        config: the recipe.
        changes: what `find_resume_changes` found.
        earlier: the recipe before.
        first_step: index of the first step with the new values.
        trained: what this start trains.
    """
    if not changes or earlier is None:
        return
    append_history(config.run.dir, first_step, changes)
    listed = "\n".join(f"  {change}" for change in changes)
    events.write(
        "config_changed",
        step=first_step,
        changes=[change.to_json() for change in changes],
        message=f"changed from step {first_step} on:\n{listed}",
    )
    now = compute_rates(trained.rates, first_step, config.optim, config.train.steps)
    before = compute_earlier_rates(earlier, first_step, trained)
    _write_jump(events, first_step, before, now)


def _write_jump(
    events: Events, step: int, before: Mapping[str, float], now: Mapping[str, float]
) -> None:
    """Write the event of learning rates that jump, with those of the parameter that jumps most."""
    jumps = {
        name: max(before[name], rate) / (min(before[name], rate) or math.ulp(0.0))
        for name, rate in now.items()
        if name in before and max(before[name], rate) > JUMP * min(before[name], rate)
    }
    if not jumps:
        return
    name = max(jumps, key=lambda each: jumps[each])
    old, new = before[name], now[name]
    whose = "" if len(jumps) == len(now) else f" of {len(jumps)} of {len(now)} parameters ({name})"
    events.write(
        "learning_rate_jump",
        step=step,
        old=old,
        new=new,
        parameter=name,
        parameters=len(jumps),
        message=f"the learning rate{whose} jumps at step {step}: it would have been {old:.3g} by "
        f"the recipe before, and is {new:.3g}",
        warning=True,
    )


def compute_rates(
    rates: Mapping[str, ParameterRate], step: int, optim: OptimSection, total_steps: int
) -> dict[str, float]:
    """The learning rate of each parameter in an optimizer step; see `compute_group_rates`."""
    return dict(
        zip(rates, compute_group_rates(step, optim, total_steps, [*rates.values()]), strict=True)
    )


def compute_earlier_rates(
    earlier: Mapping[str, Any], step: int, trained: TrainedParameters
) -> dict[str, float]:
    """The learning rates of a step by an earlier recipe; {} where they cannot be said.

    Args:
        earlier: its sections.
        step: index of the step.
        trained: the model, which may not be that of the earlier recipe.
    """
    try:
        optim = OptimSection.model_validate(earlier["optim"])
        train = TrainSection.model_validate(earlier["train"])
        plan = plan_parameters(trained.model, train, optim, trained.modalities)
        return compute_rates(plan.rates, step, optim, int(train.steps))
    except (KeyError, TypeError, ValueError, ValidationError, UsageError):
        return {}
