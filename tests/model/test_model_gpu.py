"""On a GPU: which kernels run, that nothing waits for the host, and how far bf16 is from fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from packs import empty_pack, make_pack, relative, small_model

from onellm_dist.model import OneLLMForConditionalGeneration
from onellm_dist.model.attention import packed_attention
from onellm_dist.model.kernels.select import select_backend
from onellm_dist.model.sequence_lengths import SequenceLengths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: kernels cannot be profiled here"
    ),
]

VARLEN = ("flash", "fmha", "sdpa")
"""Parts of the names of variable-length kernels of FlashAttention, torch and cuDNN."""
BF16_BOUND = 0.05
"""max |bf16 - fp32| / max |fp32| of logits: eight bits of mantissa through a dozen layers."""
ATTENTION_BOUND = 0.01

MODALITIES, LENGTHS = [("image",), ("audio",), ("imu", "fmri"), (), ("point",)], [6, 9, 3, 12, 7]


def to_gpu(
    model: OneLLMForConditionalGeneration, dtype: torch.dtype
) -> OneLLMForConditionalGeneration:
    # transformers wraps `to` so that mypy takes its first argument for `self`.
    moved: Any = model
    return cast(OneLLMForConditionalGeneration, moved.to("cuda", dtype))


def needs_kernels() -> None:
    if select_backend()[0] == "sdpa":
        pytest.skip(f"no variable-length kernel here: {select_backend()[1]}")


def kernels_of(run: Callable[[], Any]) -> list[str]:
    """Names of the attention kernels that `run` launches."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    return [n for n in names if any(part in n.lower() for part in VARLEN)]


@pytest.fixture(scope="module")
def model() -> OneLLMForConditionalGeneration:
    return to_gpu(small_model(), torch.bfloat16)


def test_encoder_upm_and_llm_run_variable_length_kernels(
    model: OneLLMForConditionalGeneration,
) -> None:
    needs_kernels()
    lengths = (47, 60, 400)
    x = torch.randn(sum(lengths), 32, device="cuda", dtype=torch.bfloat16)
    router_weights = torch.rand(90, 3, device="cuda")
    embeds = torch.randn(1, sum(lengths), 48, device="cuda", dtype=torch.bfloat16)
    seq_lengths = SequenceLengths.from_lengths(lengths, device=x.device)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        assert len(kernels_of(lambda: model.encoder(x, seq_lengths))) >= 2
        assert len(kernels_of(lambda: model.upm(x, router_weights, lengths, 30))) >= 3 * 2
        assert (
            len(
                kernels_of(
                    lambda: model.llm.model(
                        inputs_embeds=embeds,
                        attention_mask=mask,
                        seq_lengths=seq_lengths,
                        use_cache=False,
                    )
                )
            )
            >= 2
        )


def test_a_training_step_never_waits_for_the_host(model: OneLLMForConditionalGeneration) -> None:
    packs = [make_pack(MODALITIES, LENGTHS).to("cuda"), empty_pack().to("cuda")]
    for pack in packs:
        model(packed=pack).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pack in packs:
            model(packed=pack).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_kernels_agree_with_fp32(causal: bool, kv_heads: int) -> None:
    needs_kernels()
    torch.manual_seed(0)
    lengths = [5, 130, 1, 257, 64]
    q = torch.randn(sum(lengths), 8, 64, device="cuda")
    k, v = (torch.randn(sum(lengths), kv_heads, 64, device="cuda") for _ in range(2))
    seq_lengths = SequenceLengths.from_lengths(lengths, device=q.device)
    wide = [x.clone().requires_grad_() for x in (q, k, v)]
    narrow = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    reference = packed_attention(wide[0], wide[1], wide[2], seq_lengths, causal=causal)
    ours = packed_attention(narrow[0], narrow[1], narrow[2], seq_lengths, causal=causal)
    assert relative(ours.float(), reference) < ATTENTION_BOUND
    weight = torch.randn_like(reference)
    theirs = torch.autograd.grad((reference * weight).sum(), wide)
    grads = torch.autograd.grad((ours.float() * weight).sum(), narrow)
    assert all(
        relative(a.float(), b) < 5 * ATTENTION_BOUND for a, b in zip(grads, theirs, strict=True)
    )


def test_bf16_logits_agree_with_fp32() -> None:
    wide = to_gpu(small_model(), torch.float32)
    narrow = to_gpu(small_model(), torch.bfloat16)
    pack = make_pack(MODALITIES, LENGTHS).to("cuda")
    with torch.no_grad():
        assert (
            relative(
                narrow.compute_packed_logits(pack)[0].float(), wide.compute_packed_logits(pack)[0]
            )
            < BF16_BOUND
        )


def test_gpu_and_cpu_agree_in_fp32() -> None:
    model, pack = small_model(), make_pack(MODALITIES, LENGTHS)
    with torch.no_grad():
        reference = model.compute_packed_logits(pack)[0]
        torch.backends.cuda.matmul.allow_tf32 = False
        ours = to_gpu(model, torch.float32).compute_packed_logits(pack.to("cuda"))[0].cpu()
    assert relative(ours, reference) < 1e-4


def test_empty_packs_give_zero_gradients_on_a_gpu() -> None:
    model = to_gpu(small_model(), torch.bfloat16)
    model(packed=empty_pack().to("cuda")).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, g in grads.items() if g is None or g.abs().max() > 0] == []
