"""RoPE scaling that depends on the length of a text, decided for each sample by itself.

With `longrope` and `dynamic`, transformers (5.23) takes the longest position of a whole batch, and
for `dynamic` also those of batches before: one long sample would change the frequencies of all
others in a pack. Here each sample of a pack, and each row of a batch, has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

_MODULES = "_onellm_ropes"
"""Attribute of an LLM: its modules with such scaling."""
_LENGTHS = "_onellm_lengths"
"""Attribute of these modules: positions of each sample of the pack; None: rows are samples."""


def split_rope(llm: Any) -> None:
    """Let the RoPE modules of an LLM that depend on lengths work sample by sample."""
    modules = [module for module in llm.modules() if _depends_on_length(module)]
    setattr(llm, _MODULES, modules)
    for module in modules:
        setattr(module, _LENGTHS, None)
        module.forward = partial(_run_by_sample, module, module.forward)


def set_lengths(llm: Any, lengths: Sequence[int] | None) -> None:
    """Say what the next forward runs.

    It stays until the next call, because recomputation in backward needs it too.

    Args:
        llm: the causal LM.
        lengths: positions of each sample of a pack; None: the rows of a batch.
    """
    for module in getattr(llm, _MODULES, ()):
        setattr(module, _LENGTHS, lengths)


def _depends_on_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(n, str) and ("dynamic" in n or n == "longrope") for n in names)


def _run_by_sample(
    module: Any,
    forward: Any,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, T, D] for positions [B, T], each sample by itself."""
    lengths = getattr(module, _LENGTHS)
    parts = position_ids.split(1, dim=-2) if lengths is None else position_ids.split(lengths, -1)
    found = []
    for part in parts:
        if part.shape[-1]:
            _reset(module)
            found.append(forward(x, part, *args, **kwargs))
    dim = -3 if lengths is None else -2
    cosines, sines = zip(*found, strict=True)
    return torch.cat(cosines, dim), torch.cat(sines, dim)


def _reset(module: Any) -> None:
    """Forget the length of the sample before (`dynamic` only grows)."""
    kinds = module.rope_type
    for prefix, kind in (
        [(f"{k}_", v) for k, v in kinds.items()] if isinstance(kinds, dict) else [("", kinds)]
    ):
        if "dynamic" in str(kind):
            original = getattr(module, f"{prefix}original_inv_freq")
            inv_freq = getattr(module, f"{prefix}inv_freq")
            setattr(module, f"{prefix}inv_freq", original.to(inv_freq.device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
