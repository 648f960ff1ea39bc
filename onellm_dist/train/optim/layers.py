"""Where parameters stand among the transformer blocks of their part, for layer-wise rates."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

PARTS = ("encoder", "upm", "llm")
"""The parts of a model that have transformer blocks."""
LLM_INPUTS = ("wte", "wpe", "project_in")
"""Modules of an LLM's input whose names do not say `embed`."""


class LayerPosition(NamedTuple):
    """A place among n blocks: ahead of them (0), in block i (i + 1), or past them (n + 1)."""

    place: int
    blocks: int

    @property
    def below_top(self) -> int:
        """How many places lie above it; 0 past the last block."""
        return self.blocks + 1 - self.place


def map_layers(model: nn.Module) -> dict[str, LayerPosition]:
    """Parameter name to its place, for the parts that have blocks.

    The experts of a UPM stand side by side: block i of each has the same place.
    """
    found: dict[str, LayerPosition] = {}
    for part in PARTS:
        blocks = _find_blocks(model, part)
        if not blocks:
            continue
        depth = max(block.blocks for block in blocks.values())
        before = True
        for name, _ in model.get_submodule(part).named_parameters(prefix=part):
            block = next((x for prefix, x in blocks.items() if name.startswith(f"{prefix}.")), None)
            before = before and block is None
            is_input = before and (part != "llm" or _is_llm_input(name))
            found[name] = block or LayerPosition(0 if is_input else depth + 1, depth)
    return found


def _is_llm_input(name: str) -> bool:
    """Whether a parameter ahead of the blocks embeds the input.

    Some families register what stands behind the blocks first, as OPT does its last norm.
    """
    return any("embed" in step or step in LLM_INPUTS for step in name.split("."))


def _find_blocks(model: nn.Module, part: str) -> dict[str, LayerPosition]:
    """Name of each block of a part to its place."""
    return {
        f"{part}.{name}.{i}": LayerPosition(i + 1, len(module))
        for name, module in model.get_submodule(part).named_modules()
        if isinstance(module, nn.ModuleList)
        for i, block in enumerate(module)
        if isinstance(block, GradientCheckpointingLayer)
    }
