"""Activation checkpointing: what a block keeps for its backward, and what is recomputed there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm", "_scaled_mm")


def enable_activation_checkpointing(model: Any, mode: str) -> None:
    """Set what the blocks of encoder, UPM and LLM keep for backward.

    Args:
        model: a OneLLM.
        mode: `none` keeps everything. `selective` keeps the outputs of matrix products and of
            attention, and recomputes norms, activation functions, rotations and casts: it frees
            most of the memory for little work. `full` keeps the input of each block alone: it needs
            the least memory and one more forward.
    """
    if mode == "full":
        model.gradient_checkpointing_enable()
    elif mode == "selective":
        model.gradient_checkpointing_enable(
            {"context_fn": partial(create_selective_checkpoint_contexts, _choose_policy)}
        )


def _choose_policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = str(operator)
    if isinstance(operator, torch._ops.OpOverload):
        name = operator.name().split("::")[-1].split(".")[0]
    kept = name in _PRODUCTS or "attn" in name or "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
