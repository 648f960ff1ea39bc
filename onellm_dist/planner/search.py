"""Finds token budgets, recomputation and engine that fit and go fastest.

Every combination's time is predicted from a few counted micro-batches, which is cheap. Memory is
counted exactly, which is not: so combinations are looked at from the fastest on, and the first that
fits is the best. Those that could not fit even without working memory are left out before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import EngineSection, RunConfig
from onellm_dist.config.train_sections import TrainSection
from onellm_dist.data.packing import TokenBudget
from onellm_dist.data.token_budget import read_budget
from onellm_dist.modalities import SPAN_TOKENS
from onellm_dist.model.recompute import MODES
from onellm_dist.planner.frozen import decide_placement, suits_start
from onellm_dist.planner.hardware import GIGA, load_assumptions
from onellm_dist.planner.memory import MemoryPlan
from onellm_dist.planner.pack_shapes import measure_sizes
from onellm_dist.planner.run_plan import Planner, vary
from onellm_dist.train.engine.compile_check import check_compile
from onellm_dist.train.engine.frozen import can_shard_instead, list_placements
from onellm_dist.train.engine.select import all_engines, get_engine

MOST_MICRO_BATCHES = 48
"""Budgets are tried for 1 to this many micro-batches a step."""
ROOM = 1.03
"""Budget over the mean micro-batch: whole samples never fill one evenly."""
MULTIPLE = 256
"""Budgets are multiples of this."""


@dataclass(frozen=True)
class SearchSpace:
    """What is tried, in every combination."""

    budgets: tuple[TokenBudget, ...]
    modes: tuple[str, ...]
    """Values of `train.activation_checkpointing`."""
    engines: tuple[EngineSection, ...]


@dataclass(frozen=True)
class SearchResult:
    """The fastest combination that fits."""

    config: RunConfig
    overrides: tuple[str, ...]
    """What of the recipe it changes, as `key=value`."""
    combinations: int
    """How many were compared."""


def make_space(planner: Planner) -> SearchSpace:
    """Budgets for different numbers of micro-batches, all recomputation, all engines.

    The recipe's own values are among them, but for an engine whose steps cannot be timed. A budget
    holds the longest sample that the recipe allows. What `train.compile` cannot compile is left
    out.
    """
    config, cluster = planner.config, planner.cluster
    own = get_engine(config.engine.name)
    engines = [] if own.find_untimed(config.engine) else [config.engine]
    kept = {"frozen_weights": config.engine.frozen_weights}  # it changes the numbers
    for engine in all_engines().values():
        for choice in engine.list_choices(
            world_size=cluster.world_size, gpus_per_node=cluster.gpus_per_node
        ):
            section = EngineSection.model_validate({**choice, **kept})
            engine.check(section, bf16=config.train.precision == "bf16")
            if section not in engines and _can_compile(section, config.train):
                engines.append(section)
    modes: tuple[str, ...] = MODES
    if config.train.compile == "blocks":
        modes = tuple(mode for mode in MODES if mode != "selective")
    budgets = dict.fromkeys([read_budget(config.data), *list_budgets(planner)])
    return SearchSpace(tuple(budgets), modes, tuple(engines))


def _can_compile(engine: EngineSection, train: TrainSection) -> bool:
    try:
        check_compile(engine, train)
    except UsageError:
        return False
    return True


def list_budgets(planner: Planner, least: TokenBudget | None = None) -> Iterator[TokenBudget]:
    """Budgets for different numbers of micro-batches of a step, the largest first.

    Args:
        planner: plans the recipe.
        least: no budget is smaller; default: what the longest sample may need of the LLM.
    """
    least = least or TokenBudget(count_longest(planner), 1)
    data, samples = planner.data, planner.data.samples
    modalities = planner.modalities
    llm = [float(sample.llm_tokens) for sample in samples]
    encoder = [float(sum(modalities[x].encoder_tokens for x in s.spans)) for s in samples]
    share = planner.config.data.global_batch / planner.cluster.world_size
    for count in range(1, MOST_MICRO_BATCHES + 1):
        yield TokenBudget(
            *(
                _round_up(max(share / count * data.average(tokens) * ROOM, *tokens, longest))
                for tokens, longest in ((llm, least.llm), (encoder, least.encoder))
            )
        )


def count_longest(planner: Planner) -> int:
    """LLM tokens of the longest sample that a run may meet: a start refuses a smaller budget."""
    spans = max(len(sample.spans) for sample in planner.data.samples)
    data = planner.config.data
    return data.answers * (data.max_text_tokens + SPAN_TOKENS * spans)


def _round_up(tokens: float) -> int:
    return max(1, -(-int(tokens) // MULTIPLE)) * MULTIPLE


def search(
    planner: Planner,
    space: SearchSpace | None = None,
    suits: Callable[[RunConfig, MemoryPlan], bool] = lambda _, memory: memory.fits,
) -> SearchResult:
    """Find the combination that fits and goes fastest; of equally fast ones the first.

    Args:
        planner: plans the recipe.
        space: what is tried; default: `make_space`.
        suits: whether a combination may be found, by its memory; default: if it fits.

    Raises:
        UsageError: no combination fits.
    """
    space = space or make_space(planner)
    configs = [*_list_configs(planner, space)]
    possible = [config for config in configs if _could_fit(planner, config)]
    for config in sorted(possible, key=lambda c: planner.compute_time(c).total):
        if suits(config, planner.compute_memory(config)):
            return SearchResult(config, list_overrides(planner.config, config), len(configs))
    raise _explain_no_fit(planner, configs)


def search_recipe(planner: Planner) -> SearchResult:
    """Find what goes fastest with room where a start leaves it; what it would decide stays open.

    Args:
        planner: plans the recipe.

    Raises:
        UsageError: no combination fits.
    """
    found = search(planner, suits=partial(suits_start, planner.config))
    if planner.config.engine.frozen != "auto" or found.config.engine.frozen == "auto":
        return found
    undecided = vary(found.config, {"engine.frozen": "auto"})
    placement = decide_placement(planner, undecided)
    if placement is None or placement.config != found.config:
        return found
    return replace(found, config=undecided, overrides=list_overrides(planner.config, undecided))


def search_budget(planner: Planner, least: TokenBudget | None = None) -> TokenBudget:
    """Find the token budgets that fit and go fastest, with the recipe's engine and recomputation.

    Args:
        planner: plans the recipe.
        least: no budget is smaller; default: what the longest sample may need of the LLM.

    Raises:
        UsageError: none fits.
    """
    config = planner.config
    bf16 = config.train.precision == "bf16"
    space = SearchSpace(
        tuple(dict.fromkeys(list_budgets(planner, least))),
        (config.train.activation_checkpointing,),
        tuple(list_placements(config.engine, bf16=bf16)),
    )
    found = search(planner, space, partial(suits_start, config))
    return read_budget(found.config.data)


def _list_configs(planner: Planner, space: SearchSpace) -> Iterator[RunConfig]:
    """Every combination whose micro-batches hold whole samples."""
    for engine in space.engines:
        for mode in space.modes:
            for budget in space.budgets:
                config = vary(
                    planner.config,
                    {
                        "engine": engine.model_dump(),
                        "train.activation_checkpointing": mode,
                        "data.pack_llm_tokens": budget.llm,
                        "data.pack_encoder_tokens": budget.encoder,
                    },
                )
                if planner.find_too_large(config) is None:
                    yield config


def compute_least(planner: Planner, config: RunConfig) -> float:
    """Bytes below which the memory of a rank cannot be, without counting a micro-batch."""
    costs = planner.get_costs(config.train.activation_checkpointing)
    sizes = measure_sizes(planner.find_largest(config), planner.modalities)
    kept = sum(costs.count_kept(sizes).values())
    held = planner.compute_state(config).device + kept + planner.compute_buffers(config)
    context = planner.cluster.gpu.context_gb * GIGA
    return held * (1 + load_assumptions().fragmentation) + context


def _could_fit(planner: Planner, config: RunConfig) -> bool:
    return compute_least(planner, config) <= planner.cluster.gpu.memory_gb * GIGA


def _explain_no_fit(planner: Planner, configs: Sequence[RunConfig]) -> UsageError:
    if not configs:
        return UsageError(
            "no budget that was tried holds the largest sample",
            "a micro-batch holds whole samples.",
            "raise data.pack_llm_tokens and data.pack_encoder_tokens.",
        )
    smallest = min(configs, key=lambda config: compute_least(planner, config))
    memory = planner.compute_memory(smallest)
    engine, bf16 = smallest.engine, smallest.train.precision == "bf16"
    shard = "set engine.frozen=sharded, or " if can_shard_instead(engine, bf16=bf16) else ""
    return UsageError(
        f"none of {len(configs)} combinations fits: the smallest needs "
        f"{memory.total / GIGA:.1f} GB of {memory.capacity / GIGA:.1f} GB on each device, "
        f"{memory.state.device / GIGA:.1f} GB of them for weights and optimizer",
        "the run would end with the first step.",
        f"{shard}plan with more GPUs (--nodes, --gpus-per-node) or larger ones (--gpu).",
    )


def list_overrides(before: RunConfig, after: RunConfig) -> tuple[str, ...]:
    """What a recipe found by search changes, as `key=value`."""
    found = []
    for section in ("data", "train", "engine"):
        old, new = getattr(before, section), getattr(after, section)
        for name in type(new).model_fields:
            value: Any = getattr(new, name)
            if value != getattr(old, name):
                found.append(f"{section}.{name}={'null' if value is None else value}")
    return tuple(found)
