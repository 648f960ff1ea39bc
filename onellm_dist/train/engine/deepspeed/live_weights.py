"""Which weights ZeRO-3 keeps gathered, and which it gathers as one (DeepSpeed 0.19.8)."""

from __future__ import annotations

from typing import Any

from torch import nn

from onellm_dist.train.engine.deepspeed.description import MAX_LIVE
from onellm_dist.train.engine.parameters import list_indivisible


def allow_live_parameters(config: dict[str, Any], count: int) -> dict[str, Any]:
    """Return `config` with a limit of gathered weights that `count` resident ones do not exhaust.

    At the limit ZeRO-3 would no longer prefetch.
    """
    zero = config["zero_optimization"]
    limit = int(zero.get("stage3_max_live_parameters", MAX_LIVE)) + count
    return {**config, "zero_optimization": {**zero, "stage3_max_live_parameters": limit}}


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


def keep_frozen(model: nn.Module) -> None:
    """Let a partitioned model keep the weights that do not train, once they have been gathered.

    They are not among the persistent parameters that DeepSpeed gathers after each step: they do not
    change.
    """
    for parameter in model.parameters():
        held: Any = parameter
        held.ds_persist = held.ds_persist or not held.requires_grad
