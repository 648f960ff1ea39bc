"""Where weights that do not train lie, if `engine.frozen` is `auto`: sharded, or on every rank.

Whole on every rank they need more memory, and no traffic. Numbers and checkpoints are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import EngineSection, RunConfig
from onellm_dist.planner.run_plan import Planner
from onellm_dist.train.engine.select import get_engine

WORTH = 0.005
"""Share of a step that must be gained before memory is spent on it."""


@dataclass(frozen=True)
class Placement:
    """A recipe whose `engine.frozen` was `auto`, decided."""

    config: RunConfig
    reason: str


def list_placements(section: EngineSection, *, bf16: bool) -> list[EngineSection]:
    """What a section may become: `sharded`, then `resident`.

    Args:
        section: the recipe's `engine` section.
        bf16: whether the model computes in bf16.

    Returns:
        The section alone, if it says where frozen weights lie or its engine leaves no choice.
    """
    if section.frozen != "auto":
        return [section]
    engine = get_engine(section.name)
    found = [section.model_copy(update={"frozen": name}) for name in ("sharded", "resident")]
    try:
        for choice in found:
            engine.check(choice, bf16=bf16)
    except UsageError:
        return [section]
    return found


def decide_placement(planner: Planner, config: RunConfig) -> Placement | None:
    """Decide by memory and speed; None: there is nothing to decide.

    Args:
        planner: plans the recipe.
        config: the recipe, or a variation of it, with numbers for token budgets.
    """
    choices = list_placements(config.engine, bf16=config.train.precision == "bf16")
    if len(choices) < 2:
        return None
    sharded, resident = (config.model_copy(update={"engine": choice}) for choice in choices)
    before, after = (planner.compute_time(c).total for c in (sharded, resident))
    if after > before * (1 - WORTH):
        return Placement(sharded, "whole on every rank, they would make a step no faster")
    if not planner.compute_memory(resident).fits:
        return Placement(sharded, "whole on every rank, they would not fit")
    return Placement(
        resident, f"they fit, and a step takes {after:.3g} s in place of {before:.3g} s"
    )
