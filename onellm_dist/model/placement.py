"""Models whose parts transformers puts on several devices, in host memory or on a disk.

With `device_map`, accelerate hooks fetch what a module needs to the device on which it runs, when
it is called. Every parameter is read in a forward of the module that owns it, so nothing else is
needed but to know that device, and which modules stay in one piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def get_device(module: nn.Module) -> torch.device:
    """The device on which a module begins to run: where it expects its inputs.

    Args:
        module: a module with parameters.
    """
    first = None
    for part in module.modules():
        parameter = next(part.parameters(recurse=False), None)
        if parameter is None:
            continue
        if not parameter.is_meta:
            return parameter.device
        if (place := _find_fetching_device(part)) is not None:
            return place
        first = first or parameter.device
    return torch.device("cpu") if first is None else first


def _find_fetching_device(module: nn.Module) -> torch.device | None:
    """Where accelerate puts the weights of a module when it is called."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # several hooks in one
        place = getattr(each, "execution_device", None)
        if place is not None:
            return torch.device(place)
    return None


def list_layer_classes(llm: nn.Module) -> set[str]:
    """Names of the classes of an LLM's layers, each of which runs on one device.

    transformers' `_no_split_modules` of an LLM says the same, but not of every LLM. A layer that is
    split would add up tensors of two devices.

    Args:
        llm: the causal LM.
    """
    longest = max(_list_outer_lists(llm), key=len, default=[])
    return {type(layer).__name__ for layer in longest}


def _list_outer_lists(llm: nn.Module) -> list[list[nn.Module]]:
    """The lists of modules with parts that are in no other list (as experts of a layer are)."""
    names = [name for name, module in llm.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    lists: list[list[nn.Module]] = [list(llm.get_submodule(name).children()) for name in outer]
    return [own for own in lists if all(any(layer.children()) for layer in own)]
