"""Which consecutive blocks of a stack are one unit, by their sizes alone (no torch)."""

from __future__ import annotations

from collections.abc import Sequence


def join_blocks(sizes: Sequence[int], least: int) -> list[list[int]]:
    """Join consecutive blocks until they have enough parameters to be worth a collective.

    A unit ends with the block that reaches `least`: it may have nearly a block more.

    Args:
        sizes: sharded parameters of each block of a stack.
        least: sharded parameters of a unit; 0: each block is a unit.

    Returns:
        Places of the blocks of each unit.
    """
    units: list[list[int]] = []
    held = 0
    for place, size in enumerate(sizes):
        if not units or held >= max(1, least):
            units.append([])
            held = 0
        units[-1].append(place)
        held += size
    return units


def find_largest(stacks: Sequence[Sequence[int]], least: int) -> int:
    """Sharded parameters of the largest unit of all stacks; 0 if there is none.

    Args:
        stacks: sharded parameters of the blocks of each stack, in their order.
        least: as of `join_blocks`.
    """
    units = (
        sum(sizes[place] for place in unit)
        for sizes in stacks
        for unit in join_blocks(sizes, least)
    )
    return max(units, default=0)
