"""Which kernels a start computes with, as they were seen to run."""

from __future__ import annotations

from typing import Any

import torch

from onellm_dist.model.kernel_trace import trace_attention
from onellm_dist.model.llm.attention import ATTENTION_NAME
from onellm_dist.model.model_kernels import KernelChoice, try_fused_kernels
from onellm_dist.model.quantised.float8 import Float8Linear, describe_products


def record_kernels(
    model: Any, choice: KernelChoice, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The operation that computes attention in each part, and what computes fused forms.

    Args:
        model: a OneLLM.
        choice: its kernels beside attention.
        device: where it computes.
        dtype: in which dtype.
    """
    found: dict[str, Any] = {
        "choice": "fused" if choice.fused else "plain",
        "reason": choice.reason,
        "modules": choice.modules,
        "attention": trace_parts(model, device, dtype),
    }
    if choice.compiled:
        found["compiled"] = choice.compiled
    float8 = [m for m in model.modules() if isinstance(m, Float8Linear)]
    if float8:
        found["float8"] = {"modules": len(float8), "products": describe_products(device, dtype)}
    if choice.fused:
        ran = try_fused_kernels(device, dtype)
        found["ran"] = {name: ran[name] for name in choice.modules}
    return found


def trace_parts(model: Any, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Part of the model -> the operation that computes its attention."""
    vision, upm = model.config.vision, model.config.upm
    widths = {"encoder": vision.width // vision.heads, "upm": vision.width // upm.heads}
    own = model.llm_support.attention
    width = get_head_width(model.config.text_config) if own == ATTENTION_NAME else None
    if width:
        widths["llm"] = width
    known: dict[tuple[int, bool], str] = {}
    found = {}
    for part, head_width in widths.items():
        key = head_width, part == "llm"
        if key not in known:
            trace = trace_attention(device, dtype=dtype, head_width=head_width, causal=key[1])
            known[key] = trace.operation
        found[part] = known[key]
    return found if width else {**found, "llm": f"transformers' {own}"}


def get_head_width(config: Any) -> int | None:
    """Width of the heads of an LLM; None: its config does not say it in the usual words."""
    heads, hidden = (getattr(config, k, None) for k in ("num_attention_heads", "hidden_size"))
    own = getattr(config, "head_dim", None)
    return own or (hidden // heads if hidden and heads else None)
