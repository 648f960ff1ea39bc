"""What ZeRO-3's hooks cost the host, made less without another number (DeepSpeed 0.19.8)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import nn

from onellm_dist.train.engine.deepspeed.release import quicken_release

PROFILER_VARIABLE = "NSYS_PROFILING_SESSION_ID"
"""Nsight Systems sets it for the processes that it watches."""
COORDINATOR = "PartitionedParameterCoordinator"
_HOOKS = ("pre_bwd_fn", "post_bwd_fn")
"""Attributes in which ZeRO-3 keeps the autograd functions of a module."""
_KEPT = "_onellm_parameters"
"""Attribute of a module with the lists of its parameters."""


def quicken_hooks(model: nn.Module) -> None:
    """Spare ZeRO-3's hooks what they do anew at every call; after `deepspeed.initialize`.

    They run around each module, forward and backward. With the layers of onellm-7b this was about a
    third of forward:

    - torch inspects the signature of an autograd function's `forward` at every call, if it has a
      `setup_context` of its own (2.15: `torch.autograd.function._bind_default_args`);
    - the coordinator, which fetches and releases, looks for the parameters of a module, and of all
      modules in a leaf (the hooks of `parameter_offload` that look for them too are left alone);
    - it searches the rest of the step for what it may give up after a module (`quicken_release`);
    - every function is marked for a profiler; here, only if there is one.

    What is replaced in DeepSpeed's modules is so for the whole process. A version that has no such
    name runs as it is.

    Args:
        model: with DeepSpeed's hooks; it has the parameters that it will have.
    """
    _replace("utils.nvtx", "enable_nvtx", lambda _: PROFILER_VARIABLE in os.environ)
    _replace("runtime.zero.partitioned_param_coordinator", "iter_params", lambda _: list_parameters)
    _replace("runtime.zero.partitioned_param_coordinator", COORDINATOR, _quicken_coordinator)
    _replace("runtime.zero.linear", "LinearFunctionForZeroStage3", join_setup)
    for module in model.modules():
        vars(module).pop(_KEPT, None)
        for name in _HOOKS:
            if name in vars(module):
                vars(module)[name] = join_setup(vars(module)[name])


def _replace(module: str, name: str, change: Callable[[Any], Any]) -> None:
    """Replace a name in one of DeepSpeed's modules, if this version has it."""
    try:
        found = vars(import_module(f"deepspeed.{module}"))
    except ModuleNotFoundError:
        return
    if name in found:
        found[name] = change(found[name])


def _quicken_coordinator(coordinator: Any) -> Any:
    quicken_release(coordinator, list_parameters)
    return coordinator


def join_setup(function: Any) -> Any:
    """An autograd function that computes the same, with `setup_context` as part of `forward`.

    Args:
        function: an autograd function with a `setup_context` of its own, or such a one already.
    """
    if function.setup_context is torch.autograd.Function.setup_context:
        return function

    class Joined(function):  # type: ignore[misc]  # of any class
        setup_context = staticmethod(torch.autograd.Function.setup_context)

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

    return Joined


def list_parameters(module: Any, recurse: bool = False) -> Iterator[nn.Parameter]:
    """DeepSpeed's `iter_params`: own parameters, and those of others that the module reads.

    Args:
        module: prepared for ZeRO-3; its own parameters do not change any more.
        recurse: with those of all modules in it.
    """
    kept = vars(module).setdefault(_KEPT, {})
    if recurse not in kept:
        kept[recurse] = tuple(module.parameters(recurse=recurse))
    external = vars(module).get("_external_params")
    return chain(kept[recurse], (external or {}).values())
