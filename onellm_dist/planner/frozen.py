"""Where weights that do not train lie, if `engine.frozen` is `auto`: sharded, or on every rank.

Whole on every rank they need more memory, and no traffic. Numbers and checkpoints are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from onellm_dist.config.schema import RunConfig
from onellm_dist.planner.run_plan import Planner
from onellm_dist.train.engine.frozen import list_placements

WORTH = 0.005
"""Share of a step that must be gained before memory is spent on it."""


@dataclass(frozen=True)
class Placement:
    """A recipe whose `engine.frozen` was `auto`, decided."""

    config: RunConfig
    reason: str

    def describe(self) -> str:
        """The decision, for people."""
        frozen = self.config.engine.frozen
        return f"engine.frozen={frozen}, as a start would decide (auto): {self.reason}"


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
