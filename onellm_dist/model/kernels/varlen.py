"""Variable-length attention of torch: `torch.nn.attention.varlen.varlen_attn` (torch >= 2.11)."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from onellm_dist.model.kernels.base import VarlenKernel
from onellm_dist.model.sequence_lengths import SequenceLengths


@cache
def load_varlen() -> VarlenKernel:
    """`varlen_attn`, whatever form this torch has it in, on torch's FlashAttention.

    Raises:
        ImportError: this torch has none.
        AttributeError: its module has no `varlen_attn`.
    """
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    parameters = inspect.signature(function).parameters

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
        if softcap is not None or (window is not None and "window_size" not in parameters):
            raise NotImplementedError("this form of varlen_attn has no window or soft cap")
        options: dict[str, Any] = {}
        if "window_size" not in parameters:  # the form of torch 2.10
            options["is_causal"] = causal
        elif causal:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in parameters:
                options["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        # torch 2.15 prefers cuDNN where it can. cuDNN builds a graph for every new shape, and packs
        # have new shapes all the time: 42 ms each, kept for ever (pytorch PR 191576).
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attended: torch.Tensor = function(
                q.contiguous(),
                k.contiguous(),
                v.contiguous(),
                seq_lengths.cu_seqlens_q,
                seq_lengths.cu_seqlens_k,
                seq_lengths.max_seqlen_q,
                seq_lengths.max_seqlen_k,
                scale=scale,
                **options,
            )
        return attended

    return kernel
