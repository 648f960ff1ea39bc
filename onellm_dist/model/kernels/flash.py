"""FlashAttention 3 and 2, where their packages are installed."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

from onellm_dist.model.kernels.base import VarlenKernel
from onellm_dist.model.sequence_lengths import SequenceLengths


@cache
def load_flash3() -> VarlenKernel:
    """FlashAttention 3 (package `flash_attn_interface`).

    Raises:
        ImportError: the package is not installed.
        AttributeError: the package has no variable-length attention.
    """
    return _load("flash_attn_interface")


@cache
def load_flash2() -> VarlenKernel:
    """FlashAttention 2 (package `flash_attn`).

    Raises:
        ImportError: the package is not installed.
        AttributeError: the package has no variable-length attention.
    """
    return _load("flash_attn")


def _load(package: str) -> VarlenKernel:
    function = importlib.import_module(package).flash_attn_varlen_func

    def kernel(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seq_lengths: SequenceLengths,
        *,
        causal: bool,
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {}
        if window is not None:
            options["window_size"] = (window - 1, 0)  # keys before the query, keys behind it
        if softcap is not None:
            options["softcap"] = softcap
        output = function(
            q,
            k,
            v,
            seq_lengths.cu_seqlens_q,
            seq_lengths.cu_seqlens_k,
            seq_lengths.max_seqlen_q,
            seq_lengths.max_seqlen_k,
            softmax_scale=scale,
            causal=causal,
            **options,
        )
        # Betas of FlashAttention 3 before 2025-09 return (output, log-sum-exp).
        attended: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return attended

    return kernel
