"""`engine.frozen: auto`: a start asks the planner whether every rank holds all frozen weights.

It is asked at each start: another number of ranks may answer otherwise, and numbers and checkpoints
are the same with either answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.logging import get_logger
from onellm_dist.config.schema import EngineSection, RunConfig
from onellm_dist.data.plan import Plan
from onellm_dist.train.distributed import Distributed, name_device
from onellm_dist.train.engine.frozen import list_placements
from onellm_dist.train.start.planner import load_start_planner

log = get_logger(__name__)


@dataclass(frozen=True)
class FrozenDecision:
    """Where a start keeps frozen weights, as its recipe leaves it open."""

    engine: EngineSection
    """The recipe's section; still `auto` where the planner could not be asked."""
    reason: str

    @property
    def frozen(self) -> str:
        """`sharded` or `resident`."""
        return "sharded" if self.engine.frozen == "auto" else self.engine.frozen


def resolve_frozen(
    config: RunConfig, plan: Plan, dist: Distributed
) -> tuple[RunConfig, FrozenDecision | None]:
    """Decide where frozen weights lie, if the recipe leaves it open. All ranks call it together.

    Args:
        config: the recipe, with numbers for token budgets.
        plan: the run's plan.
        dist: the ranks.

    Returns:
        The recipe with `engine.frozen` decided, and why. As it is, and None, where it says so
        itself or the engine leaves no choice. As it is, which is sharded, where the planner does
        not know the devices, or fails.
    """
    if len(list_placements(config.engine, bf16=config.train.precision == "bf16")) < 2:
        return config, None
    names = sorted(set(dist.gather(name_device(dist.device))))
    decision = dist.ask_rank_zero(lambda: _decide(config, plan, dist, names))
    return config.model_copy(update={"engine": decision.engine}), decision


def _decide(config: RunConfig, plan: Plan, dist: Distributed, names: list[str]) -> FrozenDecision:
    try:
        return _ask(config, plan, dist, names)
    except Exception as error:  # whatever it is: sharding needs no plan
        what = error.what if isinstance(error, OneLLMError) else f"{type(error).__name__}: {error}"
        reason = f"the planner cannot say: {' '.join(what.split())}"
        log.warning("engine.frozen=auto is sharded: %s", reason)
        return FrozenDecision(config.engine, reason)


def _ask(config: RunConfig, plan: Plan, dist: Distributed, names: list[str]) -> FrozenDecision:
    """Decide by the slowest devices: resident only where it suits all."""
    find = load_start_planner().find_placement
    text = plan.count_mean_text(plan.data_phases[-1].start)
    answers = []
    for name in names:
        answer = find(
            config,
            device_name=name,
            nodes=max(1, dist.world_size // dist.local_world_size),
            ranks_per_node=min(dist.local_world_size, dist.world_size),
            text_tokens=text,
        )
        if answer is None:
            return FrozenDecision(config.engine, f"the planner has no constants for {name}")
        answers.append(answer)
    chosen = next((a for a in answers if a.config.engine.frozen == "sharded"), answers[0])
    return FrozenDecision(chosen.config.engine, chosen.reason)
