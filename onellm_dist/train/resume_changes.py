"""Changed hyper-parameters at a resume: refused if no step is left, else said and recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.train_sections import OptimSection
from onellm_dist.train.checkpoint.folder import get_steps_done
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.optim.schedules import compute_learning_rate
from onellm_dist.train.records.config_changes import (
    KeyChange,
    append_history,
    find_changes,
    read_earlier_recipe,
)
from onellm_dist.train.records.events import Events

STEPS = "train.steps"
EPOCH_KEYS = ("data.global_batch", "data.mixture")
"""What decides how many steps an epoch has."""
JUMP = 1.1
"""A learning rate that changes by more than this factor at a resume jumps."""


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
            f"train.steps={steps}, and the checkpoint {target.folder} has {done} steps done",
            f"no step is left to train, and a model of {done} steps is not one of {steps}.",
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


def find_resume_changes(config: RunConfig, target: ResumeTarget) -> tuple[list[KeyChange], Any]:
    """The keys that this resume changes, and the recipe before.

    Rank 0 calls it before the directory is that of this start.

    Args:
        config: the recipe.
        target: what is resumed.
    """
    if target.folder is None:
        return [], None
    earlier = read_earlier_recipe(config.run.dir, target.folder)
    return ([], None) if earlier is None else (find_changes(earlier, config), earlier)


def write_changes(
    events: Events,
    config: RunConfig,
    changes: list[KeyChange],
    earlier: Mapping[str, Any] | None,
    first_step: int,
) -> None:
    """Tell which keys changed: in the events, on the terminal and in the history. Rank 0 calls it.

    Args:
        events: where they are recorded.
        config: the recipe.
        changes: what `find_resume_changes` found.
        earlier: the recipe before.
        first_step: index of the first step with the new values.
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
    before = compute_earlier_rate(earlier, first_step)
    now = compute_learning_rate(first_step, config.optim, config.train.steps)
    if before is not None and max(before, now) > JUMP * min(before, now):
        events.write(
            "learning_rate_jump",
            step=first_step,
            old=before,
            new=now,
            message=f"the learning rate jumps at step {first_step}: it would have been "
            f"{before:.3g} by the recipe before, and is {now:.3g}",
            warning=True,
        )


def compute_earlier_rate(earlier: Mapping[str, Any], step: int) -> float | None:
    """The learning rate of a step by an earlier recipe; None where it cannot be said."""
    try:
        optim = OptimSection.model_validate(earlier["optim"])
        return compute_learning_rate(step, optim, int(earlier["train"]["steps"]))
    except (KeyError, TypeError, ValueError, ValidationError, UsageError):
        return None
