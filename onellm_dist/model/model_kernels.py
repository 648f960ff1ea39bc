"""Which kernels a model runs beside attention: plain torch, or fused ones (`train.kernels`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from onellm_dist.model.encoder import EncoderMLP
from onellm_dist.model.kernels.activations import compute_quick_gelu, compute_silu_product
from onellm_dist.model.kernels.cross_entropy import compute_chunked_cross_entropy
from onellm_dist.model.kernels.pointwise import COMPILED_DEVICES, CompiledBody
from onellm_dist.model.kernels.rms_norm import compute_rms_norm
from onellm_dist.model.kernels.rotary import rotate
from onellm_dist.model.llm.kernels import fuse_llm
from onellm_dist.model.losses.preference import list_llms
from onellm_dist.model.losses.registry import DEFAULT_LOSS
from onellm_dist.model.upm import UPMFeedForward, UPMNorm

Kernels = Literal["auto", "plain", "fused"]


@dataclass(frozen=True)
class KernelChoice:
    """Which kernels a model runs, beside attention."""

    fused: bool = False
    reason: str = "plain torch"
    modules: dict[str, int] = field(default_factory=dict)
    """Name of each fused form to the modules that run it; the loss counts as one."""
    compiled: dict[str, int] = field(default_factory=dict)
    """Class of blocks to how many of them are compiled (`train.compile`)."""

    def __str__(self) -> str:
        """The choice, its reason, and the modules."""
        name = "fused" if self.fused else "plain"
        counts = ", ".join(f"{form} {count}" for form, count in self.modules.items())
        return f"{name}: {self.reason}" + (f" ({counts})" if counts else "")


def choose_kernels(wanted: str, device_type: str) -> tuple[bool, str]:
    """Whether fused kernels run, and why.

    Args:
        wanted: `train.kernels`.
        device_type: type of the device that computes.
    """
    if wanted != "auto":
        return wanted == "fused", f"train.kernels={wanted}"
    if device_type == "cuda":
        return True, "a CUDA device"
    return False, "no CUDA device"


def get_form(module: Any) -> str | None:
    """The fused form that a module of encoder or UPM has; None: it has none."""
    if isinstance(module, UPMNorm):
        return "rms_norm"
    if isinstance(module, UPMFeedForward):
        return "swiglu"
    return module.form if isinstance(module, EncoderMLP) else None


def set_kernels(model: Any, wanted: str, device_type: str) -> KernelChoice:
    """Let a model run fused or plain kernels; after its adapters and its loss are set.

    Args:
        model: a OneLLM, whose modules are plain so far.
        wanted: `train.kernels`.
        device_type: type of the device that computes.
    """
    fused, reason = choose_kernels(wanted, device_type)
    if not fused:
        return KernelChoice(False, reason)
    found = {"rms_norm": 0, "swiglu": 0, "rotary": 0, "quick_gelu": 0, "cross_entropy": 0}
    for module in model.modules():
        form = get_form(module)
        if form is not None:
            module.fused = True
            found[form] += 1
    for llm in list_llms(model):
        for name, count in fuse_llm(llm).items():
            found[name] += count
    found["cross_entropy"] = int(model.loss_name == DEFAULT_LOSS)
    if found["cross_entropy"]:
        model.set_token_loss(compute_chunked_cross_entropy)
    return KernelChoice(True, reason, {name: n for name, n in found.items() if n})


def try_fused_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Run every fused form once, forward and backward, and say what computed it.

    Args:
        device: where.
        dtype: of activations.
    """

    def draw(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device, requires_grad=True)

    angles = torch.ones((1, 4, 8), dtype=dtype, device=device)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    trials: dict[str, Callable[[], torch.Tensor]] = {
        "rms_norm": lambda: compute_rms_norm(draw(4, 8), draw(8), 1e-5, fused=True),
        "swiglu": lambda: compute_silu_product(draw(4, 8), draw(4, 8), fused=True),
        "rotary": lambda: rotate(draw(1, 2, 4, 8), draw(1, 2, 4, 8), angles, angles)[0],
        "quick_gelu": lambda: compute_quick_gelu(draw(4, 8), fused=True),
        "cross_entropy": lambda: compute_chunked_cross_entropy(draw(4, 16), targets),
    }
    for run in trials.values():
        run().sum().backward()
    body = norm = "torch, as written"
    if device.type in COMPILED_DEVICES:
        body = CompiledBody.failure or "compiled by inductor"
        norm = "torch.nn.functional.rms_norm"
    found = dict.fromkeys(trials, body)
    return {
        **found,
        "rms_norm": norm,
        "cross_entropy": "torch, in chunks",
    }
