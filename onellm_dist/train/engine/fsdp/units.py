"""What FSDP2 gathers and frees together, and how far ahead."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from onellm_dist.model.losses.preference import list_llms
from onellm_dist.train.engine.fsdp.joining import join_blocks
from onellm_dist.train.engine.parameters import list_indivisible

Unit = list[nn.Module]
"""Modules that are gathered together; they run one after another."""


def find_units(model: Any, resident: Collection[nn.Parameter] = ()) -> list[nn.Module]:
    """Return the modules that are gathered and freed together, inner ones first.

    These are the modules that the model and its parts call indivisible, and embedding and head of
    the LLM and of its copy (DPO) if their weights are not tied. The rest is gathered with the root.

    Args:
        model: the model.
        resident: parameters that are not sharded; modules that have no others are left out.
    """
    indivisible = list_indivisible(model)
    found = [module for module in model.modules() if type(module).__name__ in indivisible]
    for llm in list_llms(model) if hasattr(model, "get_input_embeddings") else ():
        ends = (llm.get_input_embeddings(), llm.get_output_embeddings())
        if ends[0].weight is not ends[1].weight:
            found += ends
    return [unit for unit in found if any(p not in resident for p in unit.parameters())]


def group_units(
    model: nn.Module, units: Sequence[nn.Module], resident: Collection[nn.Parameter], least: int
) -> tuple[list[Unit], list[list[Unit]]]:
    """Join consecutive blocks of a stack until they have enough weights to be worth a collective.

    Args:
        model: the model.
        units: what `find_units` found.
        resident: as of `find_units`.
        least: sharded parameters of a group, which ends with the block that reaches them; 0: each
            block is a group.

    Returns:
        (all groups, in the order of `units`; the same by stack, in the order in which they run).
    """
    own = {id(unit) for unit in units}
    stacks = [
        [block for block in stack if id(block) in own]
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
    ]
    chains = [_split(stack, resident, least) for stack in stacks if stack]
    by_first = {id(group[0]): group for chain in chains for group in chain}
    inner = {id(block) for chain in chains for group in chain for block in group[1:]}
    groups = [by_first.get(id(unit), [unit]) for unit in units if id(unit) not in inner]
    return groups, chains


def _split(blocks: Unit, resident: Collection[nn.Parameter], least: int) -> list[Unit]:
    sizes = [sum(p.numel() for p in b.parameters() if p not in resident) for b in blocks]
    return [[blocks[place] for place in unit] for unit in join_blocks(sizes, least)]


def set_prefetch(chains: Sequence[Sequence[Unit]], ahead: int) -> None:
    """Let each group of a stack gather the next ones as soon as its own weights are there.

    Forward gathers nothing ahead across the end of a stack: whether the next one runs depends on
    the pack. In backward FSDP2 itself gathers the unit that ran before a stack (torch 2.15 takes an
    empty list for none given).

    Args:
        chains: groups by stack, sharded.
        ahead: how many groups are gathered ahead; 0: as FSDP2 does by itself.
    """
    if not ahead:
        return
    for chain in chains:
        firsts: list[Any] = [group[0] for group in chain]
        for place, first in enumerate(firsts):
            first.set_modules_to_forward_prefetch(firsts[place + 1 : place + 1 + ahead])
            before = firsts[max(0, place - ahead) : place]
            first.set_modules_to_backward_prefetch(before[::-1])
