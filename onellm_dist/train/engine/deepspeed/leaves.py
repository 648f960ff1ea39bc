"""Transformer blocks that ZeRO-3 gathers as one (DeepSpeed 0.19.8)."""

from __future__ import annotations

from typing import Any

from torch import nn

from onellm_dist.train.engine.parameters import list_indivisible


def name_leaves(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return `config` with the model's own transformer blocks as leaf modules, if it names any.

    The JSON may name the blocks of another LLM. Classes with a block in which anything trains are
    left out: DeepSpeed reduces the gradients of a leaf in a backward hook of the module, which
    torch runs before they are there if no input of the block requires a gradient, as of the first
    block that trains, and once for each run of a block that runs several times.

    Args:
        config: the DeepSpeed JSON.
        model: prepared for its stage, so that its parameters say what trains.
    """
    zero = config.get("zero_optimization", {})
    leaves = zero.get("leaf_module")
    if not leaves or not leaves.get("classes"):
        return config
    given = leaves["classes"]
    classes = {given} if isinstance(given, str) else set(given)
    classes |= list_indivisible(model)
    for module in model.modules():
        names = _list_names(module) & classes
        if names and any(parameter.requires_grad for parameter in module.parameters()):
            classes -= names
    leaves = {**leaves, "classes": sorted(classes)}
    return {**config, "zero_optimization": {**zero, "leaf_module": leaves}}


def _list_names(module: nn.Module) -> set[str]:
    """The names by which DeepSpeed knows a module's class."""
    kind = type(module)
    return {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"}
