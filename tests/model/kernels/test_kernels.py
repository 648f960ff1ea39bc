"""What the kernels pass to the libraries, shown by functions in their place: no GPU is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from onellm_dist.model.kernels.base import VarlenKernel
from onellm_dist.model.kernels.flash import load_flash2, load_flash3
from onellm_dist.model.kernels.sdpa import compute_sdpa
from onellm_dist.model.kernels.varlen import load_varlen
from onellm_dist.model.sequence_lengths import SequenceLengths

LENGTHS = (3, 1, 5)


def run_library(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    causal: bool,
    scale: Any,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
) -> Any:
    """What every library computes from cumulative lengths."""
    q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    seq_lengths = SequenceLengths.from_lengths(q_lengths, k_lengths, device=q.device)
    before, behind = window_size
    assert behind in (-1, 0)
    return compute_sdpa(
        q,
        k,
        v,
        seq_lengths,
        causal=causal or behind == 0,
        scale=scale,
        window=None if before < 0 else before + 1,
        softcap=softcap,
    )


def flash2(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    longest_q: int,
    longest_k: int,
    **options: Any,
) -> Any:
    assert (longest_q, longest_k) == (max(LENGTHS), max(LENGTHS))
    causal, scale = options.pop("causal"), options.pop("softmax_scale")
    return run_library(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, **options)


def flash3(*arguments: Any, **options: Any) -> Any:
    return flash2(*arguments, **options), "log-sum-exp"


def varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    longest_q: int,
    longest_k: int,
    *,
    scale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Any:
    assert (longest_q, longest_k) == (max(LENGTHS), max(LENGTHS))
    assert enable_gqa == (q.shape[1] != k.shape[1])
    with flash_alone():
        return run_library(q, k, v, cu_seqlens_q, cu_seqlens_k, False, scale, window_size)


def first_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    longest_q: int,
    longest_k: int,
    *,
    is_causal: bool = False,
    scale: Any = None,
) -> Any:
    """The form of torch 2.10, which wants as many key heads as query heads."""
    assert q.shape[1] == k.shape[1] == v.shape[1]
    with flash_alone():
        return run_library(q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal, scale)


@contextmanager
def flash_alone() -> Iterator[None]:
    """`varlen_attn` would choose FlashAttention on any GPU; this library may choose anything."""
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa_kernel(SDPBackend.MATH):
        yield


KERNELS = [
    (load_flash2, "flash_attn", "flash_attn_varlen_func", flash2),
    (load_flash3, "flash_attn_interface", "flash_attn_varlen_func", flash3),
    (load_varlen, "torch.nn.attention.varlen", "varlen_attn", varlen),
    (load_varlen, "torch.nn.attention.varlen", "varlen_attn", first_varlen),
]


@pytest.fixture
def fresh() -> Iterator[None]:
    """Kernels that are loaded anew, before and after."""
    for load in (load_flash2, load_flash3, load_varlen):
        load.cache_clear()
    yield
    for load in (load_flash2, load_flash3, load_varlen):
        load.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("load", "module", "function", "library"), KERNELS, ids=["2", "3", "varlen", "first varlen"]
)
def test_a_kernel_gives_what_its_library_computes(
    load: Callable[[], VarlenKernel],
    module: str,
    function: str,
    library: Callable[..., Any],
    kv_heads: int,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = ModuleType(module)
    setattr(fake, function, library)
    monkeypatch.setitem(sys.modules, module, fake)
    torch.manual_seed(0)
    q = torch.randn(sum(LENGTHS), 4, 8)
    k, v = (torch.randn(sum(LENGTHS), kv_heads, 8) for _ in range(2))
    seq_lengths = SequenceLengths.from_lengths(LENGTHS, device=q.device)
    ours = load()(q, k, v, seq_lengths, causal=causal, scale=0.3)
    expected = compute_sdpa(q, k, v, seq_lengths, causal=causal, scale=0.3)
    assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "options", [{"window": 2}, {"softcap": 0.5}, {"window": 2, "softcap": 1.0}]
)
@pytest.mark.parametrize(("load", "module", "function", "library"), KERNELS[:3])
def test_windows_and_soft_caps_reach_the_library(
    load: Callable[[], VarlenKernel],
    module: str,
    function: str,
    library: Callable[..., Any],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = ModuleType(module)
    setattr(fake, function, library)
    monkeypatch.setitem(sys.modules, module, fake)
    q, k, v = (torch.randn(sum(LENGTHS), 4, 8) for _ in range(3))
    seq_lengths = SequenceLengths.from_lengths(LENGTHS, device=q.device)
    if load is load_varlen and "softcap" in options:
        with pytest.raises(NotImplementedError, match="soft cap"):
            load()(q, k, v, seq_lengths, causal=True, scale=0.3, **options)
        return
    ours = load()(q, k, v, seq_lengths, causal=True, scale=0.3, **options)
    expected = compute_sdpa(q, k, v, seq_lengths, causal=True, scale=0.3, **options)
    assert torch.allclose(ours, expected, atol=1e-6)
    plain = compute_sdpa(q, k, v, seq_lengths, causal=True, scale=0.3)
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.usefixtures("fresh")
def test_a_library_that_is_not_installed_is_an_import_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # For importlib, None means "not installed".
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError):
        load_flash2()
