"""Which operation and which kernels really run, as torch sees them.

A choice may be overruled further down: `varlen_attn` and `scaled_dot_product_attention` pick among
libraries by device, dtype, shape and version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from onellm_dist.model.attention import packed_attention
from onellm_dist.model.sequence_lengths import SequenceLengths

LENGTHS = (8, 24)
"""Tokens of the sequences that are tried."""
HEADS = 2
PRODUCTS = "matrix products and softmax"
"""What computes attention where no operation of its own does."""
ATTENTION_WORDS = ("attention", "attn", "fmha", "flash")


@dataclass(frozen=True)
class KernelTrace:
    """What ran."""

    operation: str
    """The innermost operation of a library (`aten::_flash_attention_forward`)."""
    kernels: tuple[str, ...]
    """Names of the kernels on a GPU; () elsewhere, or where they were not asked for."""

    def __str__(self) -> str:
        """The operation, and the kernels in brackets."""
        kernels = f" ({', '.join(self.kernels)})" if self.kernels else ""
        return f"{self.operation}{kernels}"


def trace_attention(
    device: torch.device,
    *,
    dtype: torch.dtype,
    head_width: int,
    causal: bool,
    with_kernels: bool = False,
) -> KernelTrace:
    """Run packed attention on a few tokens, and see what computes it.

    Args:
        device: where.
        dtype: of queries, keys and values.
        head_width: D/H.
        causal: as of `packed_attention`.
        with_kernels: trace the GPU too; the first time this takes seconds.
    """
    tokens = sum(LENGTHS)
    q, k, v = (torch.ones((tokens, HEADS, head_width), dtype=dtype, device=device) for _ in "qkv")
    lengths = SequenceLengths.from_lengths(LENGTHS, device=device)

    def run() -> None:
        packed_attention(q, k, v, lengths, causal=causal)

    if device.type != "cuda":  # nothing chooses below torch's operations, and the profiler is noisy
        return KernelTrace(find_last(list_operations(run)), ())
    events = record(run, on_gpu=with_kernels)
    names = [event.name for event in events if event.device_type == DeviceType.CUDA]
    kernels = tuple(dict.fromkeys(name for name in names if _is_attention(name)))
    return KernelTrace(find_innermost(events), kernels)


class _OperationNames(TorchDispatchMode):
    """Lists the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def list_operations(run: Callable[[], Any]) -> list[str]:
    """Names of the operations of a call, in their order."""
    seen = _OperationNames()
    with torch.no_grad(), seen:
        run()
    return seen.names


def find_last(names: Iterable[str]) -> str:
    """The last attention operation; without one, attention was taken apart."""
    return next((n for n in reversed([*names]) if _is_attention(n)), PRODUCTS)


def record(run: Callable[[], Any], *, on_gpu: bool) -> list[Any]:
    """The profiler's events of a call; none if another profiler is running."""
    if torch._C._autograd._profiler_enabled():
        run()
        return []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.no_grad(), profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    return list(profiler.events() or ())


def find_innermost(events: Iterable[Any]) -> str:
    """The attention operation within which no other one runs."""
    found = [e for e in events if e.device_type == DeviceType.CPU and _is_attention(e.name)]
    inner = [e.name for e in found if not any(_is_attention(c.name) for c in e.cpu_children)]
    return inner[0] if inner else "unknown"


def _is_attention(name: str) -> bool:
    return any(word in name.lower() for word in ATTENTION_WORDS)
