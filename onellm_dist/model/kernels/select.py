"""Which attention backend runs on this machine, and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch

from onellm_dist.common.errors import UsageError
from onellm_dist.model.kernels.base import VarlenKernel
from onellm_dist.model.kernels.flash import load_flash2, load_flash3
from onellm_dist.model.kernels.varlen import load_varlen

BACKEND_VARIABLE = "ONELLM_ATTENTION"
"""Environment variable that forces a backend: `auto` (the default), `flash3`, `flash2`, `varlen`
or `sdpa`."""

_LOADERS: dict[str, Callable[[], VarlenKernel]] = {
    "flash3": load_flash3,
    "flash2": load_flash2,
    "varlen": load_varlen,
}
"""The variable-length kernels, in the order in which they are tried."""


def select_kernel(q: torch.Tensor, *, softcap: float | None = None) -> VarlenKernel | None:
    """The variable-length kernel for queries [T, H, D/H]; None: scaled-dot-product attention.

    Variable-length kernels take 16-bit CUDA tensors whose head width is a multiple of 8 up to 256.
    torch's own has no soft cap. On the meta device `counted.py` has the shapes of such a kernel.
    """
    if q.is_meta:
        from onellm_dist.model.kernels.counted import compute_counted

        return compute_counted
    name = _select_name(q.device.type, q.dtype, q.shape[-1])
    if name == "sdpa" or (name == "varlen" and softcap is not None):
        return None
    return _LOADERS[name]()


@cache
def _select_name(device_type: str, dtype: torch.dtype, head_width: int) -> str:
    if (
        device_type != "cuda"
        or dtype not in (torch.bfloat16, torch.float16)
        or head_width % 8
        or head_width > 256
    ):
        return "sdpa"
    return select_backend()[0]


@cache
def select_backend() -> tuple[str, str]:
    """The backend for 16-bit tensors on this machine's accelerator; fp32 always takes `sdpa`.

    Returns:
        (`flash3`, `flash2`, `varlen` or `sdpa`; why it was chosen).

    Raises:
        UsageError: ONELLM_ATTENTION names a backend that does not exist or cannot run here.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "auto")
    if wanted not in ("auto", "sdpa", *_LOADERS):
        raise UsageError(
            f"{BACKEND_VARIABLE}={wanted!r}",
            "no attention backend has this name.",
            "use auto, flash3, flash2, varlen or sdpa.",
        )
    if wanted == "sdpa":
        return "sdpa", f"{BACKEND_VARIABLE}=sdpa"
    if not torch.cuda.is_available():
        if wanted != "auto":
            raise UsageError(
                f"{BACKEND_VARIABLE}={wanted}",
                "this backend needs a CUDA device, and there is no CUDA device.",
                "unset the variable, or use sdpa.",
            )
        return "sdpa", "no CUDA device: scaled-dot-product attention, sequence by sequence"
    if wanted != "auto":
        obstacle = _find_obstacle(wanted)
        if obstacle is not None:
            raise UsageError(
                f"{BACKEND_VARIABLE}={wanted}",
                f"{wanted}: {obstacle}.",
                "install it, or unset the variable.",
            )
        return wanted, f"{BACKEND_VARIABLE}={wanted}"
    reasons: list[str] = []
    for name in _LOADERS:
        obstacle = _find_obstacle(name)
        if obstacle is None:
            return name, "; ".join([*reasons, f"{name} can be used"])
        reasons.append(f"{name}: {obstacle}")
    return "sdpa", "; ".join(reasons)


def forget_backend() -> None:
    """Choose anew at the next call: the environment or the machine has changed."""
    select_backend.cache_clear()
    _select_name.cache_clear()


def _find_obstacle(name: str) -> str | None:
    """Why a kernel cannot run on the current CUDA device; None: it can."""
    major = torch.cuda.get_device_capability()[0]
    if name == "flash3" and major != 9:
        return "needs a Hopper GPU"
    if major < 8:
        return "needs an Ampere GPU or newer"
    try:
        _LOADERS[name]()
    except (ImportError, AttributeError) as error:
        return f"not installed ({error})"
    return None
