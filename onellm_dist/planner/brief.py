"""What the planner says about a recipe in a few lines, for `onellm train RECIPE --show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.planner.command import FOUND_BUDGETS, PlanOptions, make_planner
from onellm_dist.planner.hardware import find_gpus_here
from onellm_dist.planner.show import format_gb

ASSUMED_GPU = "h100"
"""What is planned for on a machine without a GPU that the planner knows."""


def describe_briefly(recipe: Path | str, overrides: Sequence[str]) -> list[str]:
    """Say what a run needs and how long it takes, or why that is not known. Nothing is refused.

    Args:
        recipe: a file, or the name of a recipe that ships.
        overrides: `key=value`.
    """
    try:
        kind, _ = find_gpus_here()
        options, where = PlanOptions(here=True), f"on this machine ({kind.kind})"
    except OneLLMError:
        options = PlanOptions(gpu=ASSUMED_GPU)
        where = f"on one node of eight {ASSUMED_GPU}, as this machine has no GPU that is known"
    try:
        planner = make_planner(recipe, overrides, options)
        plan = planner.plan()
    except OneLLMError as error:
        first, *_ = error.what.splitlines()
        return [f"  not planned: {first.rstrip('.')}"]
    memory = plan.memory
    found = [f"  {note}" for note in planner.data.notes if note.startswith(FOUND_BUDGETS)]
    fits = "fits" if memory.fits else "does not fit"
    return [
        f"  {where}:",
        f"  {fits}: {format_gb(memory.total)} of {format_gb(memory.capacity)} on each",
        f"  {plan.time.total:.3g} s a step, {plan.samples_per_second:.3g} samples/s, "
        f"{plan.hours:.3g} hours",
        *found,
        f"  more: onellm plan {recipe} --help",
    ]
