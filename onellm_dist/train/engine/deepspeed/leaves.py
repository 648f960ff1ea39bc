"""Transformer blocks that ZeRO-3 gathers as one (DeepSpeed 0.19.8)."""

from __future__ import annotations

from typing import Any

from torch import nn

from onellm_dist.train.engine.parameters import list_indivisible


def name_leaves(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return `config` with the model's own transformer blocks as leaf modules, if it names any.

    The JSON may name the blocks of another LLM. Blocks that train and may run more than once in a
    forward pass are left out: DeepSpeed would reduce the gradients of such a leaf at each run.
    """
    zero = config.get("zero_optimization", {})
    leaves = zero.get("leaf_module")
    if not leaves or not leaves.get("classes"):
        return config
    given = leaves["classes"]
    classes = {given} if isinstance(given, str) else set(given)
    classes |= list_indivisible(model)
    classes -= {
        type(module).__name__
        for module in model.modules()
        if getattr(module, "runs_repeatedly", False)
        and any(parameter.requires_grad for parameter in module.parameters())
    }
    leaves = {**leaves, "classes": sorted(classes)}
    return {**config, "zero_optimization": {**zero, "leaf_module": leaves}}
