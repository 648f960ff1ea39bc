"""Where weights that do not train lie, if `engine.frozen` is `auto`: sharded, or on every rank.

Complete on every rank, they need more memory, and no traffic. Numbers and checkpoints are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from onellm_dist.config.schema import RunConfig
from onellm_dist.planner.memory import MemoryPlan
from onellm_dist.planner.run_plan import Planner
from onellm_dist.train.engine.frozen import list_placements

WORTH = 0.005
"""Share of a step that must be gained before memory is spent on it."""
FULLEST = 0.9
"""Share of a device that a run may fill with all weights on every rank, if nobody asked for that:
memory is predicted within some percent, and no start shards them again after an out-of-memory."""


@dataclass(frozen=True)
class Placement:
    """A recipe whose `engine.frozen` was `auto`, decided."""

    config: RunConfig
    reason: str

    def describe(self) -> str:
        """The decision, for people."""
        frozen = self.config.engine.frozen
        return f"engine.frozen={frozen}, as a start would decide (auto): {self.reason}"


def suits_start(before: RunConfig, after: RunConfig, memory: MemoryPlan) -> bool:
    """Whether a start would train a variation of a recipe: it fits, with room where it must.

    Args:
        before: the recipe.
        after: the variation.
        memory: that of the variation.
    """
    decided = before.engine.frozen == "auto" and after.engine.frozen == "resident"
    return memory.total <= memory.capacity * (FULLEST if decided else 1)


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
        return Placement(sharded, "keeping them on every rank would not make a step faster")
    memory = planner.compute_memory(resident)
    if not memory.fits:
        return Placement(sharded, "on every rank, they would not fit")
    if not suits_start(config, resident, memory):
        return Placement(
            sharded,
            f"on every rank, they would leave less than {1 - FULLEST:.0%} of the memory free",
        )
    return Placement(
        resident, f"they fit, and a step takes {after:.3g} s in place of {before:.3g} s"
    )
