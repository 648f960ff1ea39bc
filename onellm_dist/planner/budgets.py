"""What a start asks the planner about the devices at hand, where the recipe says `auto`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.packing import TokenBudget
from onellm_dist.data.token_budget import UNLIMITED
from onellm_dist.planner.command import PlanOptions, make_config_planner, with_budget
from onellm_dist.planner.counting import RESULTS
from onellm_dist.planner.frozen import Placement, decide_placement
from onellm_dist.planner.hardware import GpuKind, find_kind
from onellm_dist.planner.search import search_budget


def find_budget(
    config: RunConfig,
    *,
    device_name: str,
    nodes: int,
    ranks_per_node: int,
    text_tokens: int,
    least: TokenBudget,
) -> TokenBudget:
    """Find the budgets that fit a device and go fastest; `train/start/pack_budget.py` asks.

    Args:
        config: the recipe.
        device_name: as the device calls itself.
        nodes: nodes of the run.
        ranks_per_node: ranks on each.
        text_tokens: mean text tokens of a sample.
        least: what the largest sample needs.

    Raises:
        UsageError: there are no constants for the device, or nothing fits.
    """
    kind = find_kind(device_name)
    if kind is None:
        raise UsageError(
            f"data.pack_llm_tokens=auto: the planner has no constants for {device_name}",
            "it cannot say which budgets fit.",
            "measure them in two minutes (onellm plan --calibrate), or set both budgets to "
            "numbers.",
        )
    options = _make_options(kind, nodes, ranks_per_node, text_tokens)
    with _forgetting():
        return search_budget(make_config_planner(with_budget(config, UNLIMITED), options), least)


def find_placement(
    config: RunConfig, *, device_name: str, nodes: int, ranks_per_node: int, text_tokens: int
) -> Placement | None:
    """Decide where frozen weights lie; `train/start/frozen_placement.py` asks.

    Args:
        config: the recipe, with numbers for token budgets.
        device_name: as of `find_budget`.
        nodes: as of `find_budget`.
        ranks_per_node: as of `find_budget`.
        text_tokens: as of `find_budget`.

    Returns:
        None if there is nothing to decide, or there are no constants for the device.

    Raises:
        UsageError: the recipe cannot be planned.
    """
    kind = find_kind(device_name)
    if kind is None:
        return None
    options = _make_options(kind, nodes, ranks_per_node, text_tokens)
    with _forgetting():
        return decide_placement(make_config_planner(config, options), config)


@contextmanager
def _forgetting() -> Iterator[None]:
    """Leave nothing of a plan in the process, which trains next."""
    try:
        yield
    finally:
        RESULTS.forget()


def _make_options(kind: GpuKind, nodes: int, ranks_per_node: int, text_tokens: int) -> PlanOptions:
    return PlanOptions(
        gpu=kind.kind, nodes=nodes, gpus_per_node=ranks_per_node, text_tokens=max(1, text_tokens)
    )
