"""torch.compile of single transformer blocks (`train.compile: blocks`; seen with torch 2.15).

What stands before and behind attention in a block becomes one graph each. Attention is not traced:
it takes the lengths of a pack's sequences, and dynamo would compile a block again for other ones.
All other sizes are symbols, so that new packs run what earlier ones compiled. A whole block is
never one graph, and blocks of one class share their graphs.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AttentionInterface

from onellm_dist.common.errors import UsageError
from onellm_dist.model.attention import packed_attention
from onellm_dist.model.encoder import EncoderAttention
from onellm_dist.model.llm.attention import ATTENTION_NAME, compute_llm_attention
from onellm_dist.model.upm import UPMAttention

GRAPHS_OF_ONE_CODE = 64
"""Graphs that a piece of a block may have; torch's own limit is 8, beyond which a piece runs
uncompiled. Each is compiled anew for training and validation, with and without gradients of its
inputs, for adapters, and for packs that lack something."""
_CHECKPOINTING = "forward_with_checkpointing"
"""What transformers (5.23) wraps the forward of each class of layers in, subclasses included."""


def compile_blocks(model: Any, device_type: str) -> dict[str, int]:
    """Let inductor compile the blocks of encoder, UPM and LLM, each kind when it first runs.

    Args:
        model: a OneLLM, whose kernels and adapters are set. It is not sharded yet: an engine's
            hooks stay outside of what is compiled.
        device_type: type of the device that computes.

    Returns:
        Name of each class of blocks to how many there are.

    Raises:
        UsageError: nothing can be compiled on this machine.
    """
    check_compiler(device_type)
    untraced: Any = torch.compiler.disable(packed_attention)
    for module in model.modules():
        if isinstance(module, EncoderAttention | UPMAttention):
            module.attend = untraced
    # transformers' models find attention by its name.
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(compute_llm_attention))
    found: dict[str, int] = {}
    kinds: dict[type, type] = {}
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in model._no_split_modules:
            if kind not in kinds:
                kinds[kind] = _compile_class(kind)
            module.__class__ = kinds[kind]
            found[kind.__name__] = found.get(kind.__name__, 0) + 1
    return found


def _compile_class(kind: Any) -> type:
    """A subclass whose forward is compiled; recomputation stays around it."""
    forward = kind.forward
    while forward.__code__.co_name == _CHECKPOINTING:
        forward = forward.__wrapped__
    members = {
        "forward": torch.compile(forward, dynamic=True, **_raise_limit()),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind,), members)


def _raise_limit() -> dict[str, Any]:
    """What torch.compile takes as its limit of graphs.

    Where it takes none (before torch 2.15), torch's setting is raised: in torch 2.11 that of all
    threads. A torch whose threads have settings of their own keeps its limit in the thread in which
    autograd recomputes a block on a GPU.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": GRAPHS_OF_ONE_CODE}
    from torch._dynamo import config  # its import takes two seconds

    config.recompile_limit = max(config.recompile_limit, GRAPHS_OF_ONE_CODE)
    return {}


def check_compiler(device_type: str) -> None:
    """Compile a small function, and run it on the device that computes.

    Args:
        device_type: type of that device; processors and GPUs have different compilers.

    Raises:
        UsageError: that fails, or torch.compile does nothing.
    """
    what = "train.compile=blocks: torch.compile"
    try:
        found = torch.compile(_add_if_compiled)(torch.zeros(4, device=device_type))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UsageError(
            f"{what} fails on {device_type}: {type(error).__name__}: {reason}",
            "inductor needs a C++ compiler on the CPU, and Triton and a C compiler on a GPU.",
            "install them, or use train.compile=none.",
        ) from error
    if not found.all():
        raise UsageError(
            f"{what} is switched off",
            "TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE is set, so that nothing is compiled.",
            "unset it, or use train.compile=none.",
        )


def _add_if_compiled(x: torch.Tensor) -> torch.Tensor:
    return x + float(torch.compiler.is_compiling())
