"""`engine.frozen: auto`: a start asks the planner whether frozen weights are whole on every rank.

It is asked at each start: another number of ranks may answer otherwise, and numbers and checkpoints
are the same with either answer.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.logging import get_logger
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.plan import Plan
from onellm_dist.train.distributed import Distributed, name_device
from onellm_dist.train.engine.frozen import list_placements

FINDER = "onellm_dist.planner.budgets:find_placement"
"""The planner knows training, so training knows it by this name alone."""
log = get_logger(__name__)


def resolve_frozen(config: RunConfig, plan: Plan, dist: Distributed) -> RunConfig:
    """Decide where frozen weights lie, if the recipe leaves it open. All ranks call it together.

    Args:
        config: the recipe, with numbers for token budgets.
        plan: the run's plan.
        dist: the ranks.

    Returns:
        The recipe with `engine.frozen` decided; as it is, where it says so itself, the engine
        leaves no choice, or the planner does not know the devices (they are sharded then).
    """
    if len(list_placements(config.engine, bf16=config.train.precision == "bf16")) < 2:
        return config
    names = sorted(set(dist.gather(name_device(dist.device))))
    found = _ask(config, plan, dist, names) if dist.is_rank_zero else None
    engine = dist.broadcast(found)
    return config if engine is None else config.model_copy(update={"engine": engine})


def _ask(config: RunConfig, plan: Plan, dist: Distributed, names: list[str]) -> Any:
    """The `engine` section by the slowest devices: resident only where it suits all."""
    find: Callable[..., Any] = pkgutil.resolve_name(FINDER)
    text = plan.count_mean_text(plan.data_phases[-1].start)
    answers = []
    for name in names:
        try:
            answer = find(
                config,
                device_name=name,
                nodes=max(1, dist.world_size // dist.local_world_size),
                ranks_per_node=min(dist.local_world_size, dist.world_size),
                text_tokens=text,
            )
        except OneLLMError as error:
            log.warning("engine.frozen=auto is sharded: the planner cannot say: %s", error.what)
            return None
        if answer is None:
            return None
        answers.append(answer)
    chosen = next((a for a in answers if a.config.engine.frozen == "sharded"), answers[0])
    log.info("engine.frozen=%s (auto): %s", chosen.config.engine.frozen, chosen.reason)
    return chosen.config.engine
