"""Attention over packed tokens: one function for the encoder, the UPM and the LLM, on whatever kernel the machine has.

FlashAttention 3 or 2 where installed, else torch's `varlen_attn` (torch >= 2.11), both on CUDA in bf16 or fp16; anywhere else
scaled-dot-product attention segment by segment, with seq_lengths of equal length in one batched call.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from onellm_dist.common.errors import OneLLMError, UsageError

ATTENTION_NAME = "onellm_varlen"
"""The name under which transformers' models find `llm_attention` (their `attn_implementation`)."""
BACKEND_VARIABLE = "ONELLM_ATTENTION"
"""Environment variable that forces a backend: `auto` (default), `flash3`, `flash2`, `varlen` or `sdpa`."""

_Kernel = Callable[..., torch.Tensor]


def device_tensor(
    values: Any, device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Host integers as a tensor on `device`, through page-locked memory so that a GPU's queue is not drained."""
    host = torch.as_tensor(values, dtype=dtype)
    return (
        host.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else host.to(device)
    )


@dataclass(frozen=True)
class SequenceLengths:
    """Where the sequences of a pack begin and end; query and key lengths may differ (the UPM's last block).

    Attributes:
        q_lengths, k_lengths: tokens of each sequence, on the host.
        cu_seqlens_q, cu_seqlens_k: [n + 1] int32 cumulative lengths on the device.
    """

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor

    @classmethod
    def of(
        cls,
        q_lengths: Sequence[int],
        k_lengths: Sequence[int] | None = None,
        *,
        device: torch.device,
    ) -> SequenceLengths:
        """SequenceLengths from host lengths (no synchronisation); `k_lengths` is `q_lengths` where not given."""
        q = tuple(q_lengths)
        cu_seqlens_q = _cumulative(q, device)
        if k_lengths is None or tuple(k_lengths) == q:
            return cls(q, q, cu_seqlens_q, cu_seqlens_q)
        k = tuple(k_lengths)
        if len(k) != len(q):
            raise ValueError(f"{len(q)} query seq_lengths but {len(k)} key seq_lengths")
        return cls(q, k, cu_seqlens_q, _cumulative(k, device))

    @property
    def max_seqlen_q(self) -> int:
        """The longest query segment, 0 for an empty pack."""
        return max(self.q_lengths, default=0)

    @property
    def max_seqlen_k(self) -> int:
        """The longest key segment, 0 for an empty pack."""
        return max(self.k_lengths, default=0)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbours of equal lengths: (seq_lengths, query length, key length) each."""
        return [
            (len(list(g)), q, k)
            for (q, k), g in groupby(zip(self.q_lengths, self.k_lengths, strict=True))
        ]

    @cached_property
    def buckets(self) -> list[tuple[int, int, torch.Tensor]]:
        """For causal attention: (seq_lengths, padded length, [seq_lengths * padded] token rows) by powers of two of the length.

        Padding repeats row 0 of the pack behind a segment's end, where causality hides it from every real token.
        """
        starts = torch.tensor((0, *self.q_lengths)).cumsum(0)
        out = []
        for _, group in groupby(
            sorted(range(len(self.q_lengths)), key=lambda i: self.q_lengths[i]),
            key=lambda i: _bucket(self.q_lengths[i]),
        ):
            members = list(group)
            lengths = torch.tensor([self.q_lengths[i] for i in members])
            column = torch.arange(int(lengths.max()))
            rows = torch.where(column < lengths[:, None], starts[members][:, None] + column, -1)
            out.append((len(members), len(column), rows.flatten()))
        return out

    @cached_property
    def bucket_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows to gather into the padded buckets, where each token of the pack then stands in them)."""
        rows = (
            torch.cat([r for _, _, r in self.buckets])
            if self.buckets
            else torch.empty(0, dtype=torch.int64)
        )
        back = torch.empty(sum(self.q_lengths), dtype=torch.int64)
        real = rows >= 0
        back[rows[real]] = torch.arange(len(rows))[real]
        device = self.cu_seqlens_q.device
        return device_tensor(rows.clamp(min=0), device), device_tensor(back, device)


def _bucket(length: int) -> int:
    return (length - 1).bit_length()


def _cumulative(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return device_tensor(torch.tensor((0, *lengths)).cumsum(0), device, torch.int32)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lengths: SequenceLengths,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention within each segment of a pack: [T, H, D], [S, Hkv, D], [S, Hkv, D] -> [T, H, D].

    Hkv may divide H (grouped-query attention). An empty pack gives an empty output that stays in the autograd graph.

    Args:
        seq_lengths: the pack's boundaries.
        causal: query i of a segment sees keys 0..i of it (lengths must be equal).
        scale: of the scores; 1 / sqrt(D) where not given.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    name = _kernel_for(q.device.type, q.dtype, q.shape[-1])
    if name == "sdpa" or not q.shape[0]:
        return _sdpa(q, k, v, seq_lengths, causal=causal, scale=scale)
    kernel = _KERNELS[name]()
    return kernel(
        q,
        k,
        v,
        seq_lengths.cu_seqlens_q,
        seq_lengths.cu_seqlens_k,
        seq_lengths.max_seqlen_q,
        seq_lengths.max_seqlen_k,
        causal,
        scale,
    )


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """`packed_attention` for callers that have cumulative lengths only: reading them synchronises with a GPU.

    Shapes as there; cu_seqlens_q and cu_seqlens_k are [n + 1] integers, max_seqlen_q and max_seqlen_k the longest lengths.
    """
    q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    if max(q_lengths, default=0) > max_seqlen_q or max(k_lengths, default=0) > max_seqlen_k:
        raise ValueError(
            f"a segment is longer than max_seqlen_q={max_seqlen_q} or max_seqlen_k={max_seqlen_k}"
        )
    return packed_attention(
        q,
        k,
        v,
        SequenceLengths.of(q_lengths, k_lengths, device=q.device),
        causal=causal,
        scale=scale,
    )


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lengths: SequenceLengths,
    *,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    if causal and seq_lengths.q_lengths != seq_lengths.k_lengths:
        raise ValueError("causal packed attention needs equal query and key lengths")
    if causal and len(seq_lengths.runs) > 1:
        return _sdpa_buckets(q, k, v, seq_lengths, scale)
    runs = seq_lengths.runs or [(0, 1, 1)]
    q_parts, k_parts, v_parts = (
        x.split([n * (lq if x is q else lk) for n, lq, lk in runs]) for x in (q, k, v)
    )
    out = [
        _sdpa_batch(a, b, c, n, lq, lk, causal=causal, scale=scale)
        for a, b, c, (n, lq, lk) in zip(q_parts, k_parts, v_parts, runs, strict=True)
    ]
    return out[0] if len(out) == 1 else torch.cat(out)


def _sdpa_buckets(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seq_lengths: SequenceLengths,
    scale: float | None,
) -> torch.Tensor:
    rows, back = seq_lengths.bucket_rows
    sizes = [n * length for n, length, _ in seq_lengths.buckets]
    parts = zip(
        *(x.index_select(0, rows).split(sizes) for x in (q, k, v)), seq_lengths.buckets, strict=True
    )
    out = [
        _sdpa_batch(a, b, c, n, length, length, causal=True, scale=scale)
        for a, b, c, (n, length, _) in parts
    ]
    return (out[0] if len(out) == 1 else torch.cat(out)).index_select(0, back)


def _sdpa_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    n: int,
    lq: int,
    lk: int,
    *,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """N seq_lengths of one length: [n * lq, H, D] -> [n * lq, H, D]."""
    q, k, v = (
        x.reshape(n, length, x.shape[1], x.shape[2]).transpose(1, 2)
        for x, length in ((q, lq), (k, lk), (v, lk))
    )
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(n * lq, out.shape[1], out.shape[3])


# -- kernels ---------------------------------------------------------------------------------------------------------------


@cache
def _flash3() -> _Kernel:
    function = importlib.import_module("flash_attn_interface").flash_attn_varlen_func

    def kernel(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=scale,
            causal=causal,
        )
        return out[0] if isinstance(out, tuple) else out  # betas before 2025-09 return (out, lse)

    return kernel


@cache
def _flash2() -> _Kernel:
    function = importlib.import_module("flash_attn").flash_attn_varlen_func

    def kernel(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        return function(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=scale,
            causal=causal,
        )

    return kernel


@cache
def _varlen() -> _Kernel:
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    parameters = inspect.signature(function).parameters

    def kernel(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = (
            {"window_size": (-1, 0)} if "window_size" in parameters and causal else {}
        )
        if "window_size" not in parameters:  # torch 2.10's first form
            options["is_causal"] = causal
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in parameters:
                options["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return function(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            scale=scale,
            **options,
        )

    return kernel


_KERNELS: dict[str, Callable[[], _Kernel]] = {
    "flash3": _flash3,
    "flash2": _flash2,
    "varlen": _varlen,
}


@cache
def _kernel_for(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend for these inputs: variable-length kernels take 16-bit CUDA tensors with heads of a multiple of 8 up to 256."""
    if (
        device_type != "cuda"
        or dtype not in (torch.bfloat16, torch.float16)
        or head_dim % 8
        or head_dim > 256
    ):
        return "sdpa"
    return backend()[0]


@cache
def backend() -> tuple[str, str]:
    """(`flash3` | `flash2` | `varlen` | `sdpa`, why), for 16-bit tensors on this machine's accelerator; fp32 always takes `sdpa`.

    Raises:
        UsageError: ONELLM_ATTENTION names a backend that does not exist or cannot be used here.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "auto")
    if wanted not in ("auto", "sdpa", *_KERNELS):
        raise UsageError(
            f"{BACKEND_VARIABLE}={wanted!r}",
            "no attention backend has this name.",
            "use auto, flash3, flash2, varlen or sdpa.",
        )
    if wanted == "sdpa":
        return "sdpa", f"{BACKEND_VARIABLE}=sdpa asks for it"
    if not torch.cuda.is_available():
        if wanted != "auto":
            raise UsageError(
                f"{BACKEND_VARIABLE}={wanted}", "no CUDA device is here.", "unset it, or use sdpa."
            )
        return "sdpa", "no CUDA device: scaled-dot-product attention, segment by segment"
    reasons: list[str] = []
    for name in _KERNELS if wanted == "auto" else (wanted,):
        reason = _unusable(name)
        if reason is None:
            return name, f"{BACKEND_VARIABLE}={wanted}" if wanted != "auto" else "; ".join(
                [*reasons, f"{name} can be used"]
            )
        reasons.append(f"{name}: {reason}")
    if wanted != "auto":
        raise UsageError(
            f"{BACKEND_VARIABLE}={wanted}", reasons[0] + ".", "install it, or unset the variable."
        )
    return "sdpa", "; ".join(reasons)


def _unusable(name: str) -> str | None:
    """Why a kernel cannot be used on the current CUDA device, or None."""
    major = torch.cuda.get_device_capability()[0]
    if name == "flash3" and major != 9:
        return "needs a Hopper GPU"
    if major < 8:
        return "needs an Ampere GPU or newer"
    try:
        _KERNELS[name]()
    except (ImportError, AttributeError) as error:
        return f"not installed ({error})"
    return None


# -- transformers ----------------------------------------------------------------------------------------------------------


def llm_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    seq_lengths: SequenceLengths | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call: packed where `seq_lengths` came with the forward, else plain SDPA with its mask.

    query [B, H, S, D], key and value [B, Hkv, S, D]; B = 1 where packed. Returns ([B, S, H, D], None).
    """
    if seq_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window = kwargs.get("sliding_window")
    unsupported = [
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    ]
    if window is not None and seq_lengths.max_seqlen_k > window:
        unsupported.append(f"sliding_window={window}")
    if dropout:
        unsupported.append(f"attention dropout {dropout}")
    if unsupported:
        raise OneLLMError(
            f"packed attention cannot do {', '.join(unsupported)}, which {type(module).__name__} asks for",
            "its numbers would silently differ from the LLM's own.",
            "use an LLM without it, or shorter sequences where it is a sliding window.",
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = packed_attention(q, k, v, seq_lengths, causal=True, scale=scaling)
    return out[None], None


def packed_mask(device: torch.device) -> torch.Tensor:
    """A stand-in mask for a packed forward: transformers (5.17 to 5.23) passes a 4-D mask on as it is.

    Without one it looks for restarting positions, which synchronises with the GPU and builds a [T, T] mask.
    """
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


AttentionInterface.register(ATTENTION_NAME, llm_attention)
# Without a mask function of the same name, transformers makes no mask at all and left-padded batches are silently wrong.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
