"""A model with fused kernels computes what it computes without; LLMs of any family keep exact."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from packs import make_pack, relative, small_model
from torch import nn

from onellm_dist.model import OneLLMForConditionalGeneration
from onellm_dist.model.llm.kernels import fuse_llm
from onellm_dist.model.losses.registry import compute_cross_entropy
from onellm_dist.model.model_kernels import choose_kernels, set_kernels, try_fused_kernels
from onellm_dist.model.recompute import enable_activation_checkpointing

MODALITIES = ("image", "imu")
PACK = make_pack([("image",), ("imu",), ()], [6, 9, 4])
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def run(model: OneLLMForConditionalGeneration) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    model.requires_grad_(True)
    model.encoder.proj.requires_grad_(False)
    loss = model(packed=PACK).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_fused_model_has_the_loss_and_gradients_of_the_plain_one(mode: str) -> None:
    plain, expected = run(small_model(modalities=MODALITIES))
    model = small_model(modalities=MODALITIES)
    choice = set_kernels(model, "fused", "cpu")
    enable_activation_checkpointing(model, mode)
    # Three experts of two blocks; an LLM of two layers.
    assert choice.modules == {
        "rms_norm": 3 * 2 * 2 + 2 * 2 + 1,
        "swiglu": 3 * 2 + 2,
        "rotary": 2,
        "quick_gelu": 2,
        "cross_entropy": 1,
    }
    loss, gradients = run(model)
    assert relative(loss, plain) <= 1e-6
    assert gradients.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in gradients.items():
        scale = max(expected[name].abs().max(), 1e-3 * largest)
        assert (gradient - expected[name]).abs().max() <= 2e-5 * scale, name


def test_bf16_stays_close() -> None:
    """Losses within 0.5%: norms and activation functions round once less."""
    plain = small_model(modalities=MODALITIES).bfloat16()
    fused = small_model(modalities=MODALITIES).bfloat16()
    set_kernels(fused, "fused", "cpu")
    assert relative(fused(packed=PACK).loss, plain(packed=PACK).loss) <= 5e-3


def test_auto_is_plain_on_a_cpu_and_changes_nothing() -> None:
    model = small_model(modalities=MODALITIES)
    before = [module.__dict__.get("forward") for module in model.modules()]
    choice = set_kernels(model, "auto", "cpu")
    assert not choice.fused and not choice.modules and "no CUDA device" in str(choice)
    assert [module.__dict__.get("forward") for module in model.modules()] == before
    assert model.token_loss is compute_cross_entropy
    assert choose_kernels("auto", "cuda")[0] and not choose_kernels("plain", "cuda")[0]


def test_a_loss_of_one_s_own_is_left_alone() -> None:
    model = small_model(modalities=MODALITIES)
    model.set_loss("json:dumps")
    before = model.token_loss
    assert "cross_entropy" not in set_kernels(model, "fused", "cpu").modules
    assert model.token_loss is before


def make_llm(name: str, **more: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    torch.manual_seed(3)
    llm: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in llm.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)  # norm weights that are not 1
    return llm.eval()


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("Llama", {"rms_norm": 5, "swiglu": 2, "rotary": 2}),
        ("Qwen2", {"rms_norm": 5, "swiglu": 2, "rotary": 2}),
        ("Qwen3", {"rms_norm": 9, "swiglu": 2, "rotary": 2}),  # norms of queries and keys
        ("Mistral", {"rms_norm": 5, "swiglu": 2, "rotary": 2}),
        ("Gemma2", {"rms_norm": 0, "swiglu": 0, "rotary": 2}),  # 1 + weight, and GELU
        ("Phi3", {"rms_norm": 5, "swiglu": 0, "rotary": 2}),  # one matrix for gate and input
        ("Cohere", {"rms_norm": 0, "swiglu": 2, "rotary": 0}),  # rotates neighbouring channels
        ("GPTNeoX", {"rms_norm": 0, "swiglu": 0, "rotary": 2}),  # a quarter of each head rotates
    ],
)
def test_an_llm_keeps_its_logits_and_what_differs_keeps_its_code(
    name: str, fused: dict[str, int]
) -> None:
    llm: Any = make_llm(name)
    ids = torch.arange(2, 26).reshape(2, 12)
    names = [*llm.state_dict()]
    with torch.no_grad():
        before = llm(input_ids=ids).logits
        found = fuse_llm(llm)
        after = llm(input_ids=ids).logits
    assert {form: found[form] for form in fused} == fused
    assert relative(after, before) <= 1e-5
    assert [*llm.state_dict()] == names


@pytest.mark.parametrize("hides", [False, True], ids=["function", "object"])
def test_a_decorated_attention_is_fused_and_keeps_its_decorator(
    hides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.24 decorates them; one whose inner function cannot be found keeps its code."""
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    own, calls = attention.forward, []

    @functools.wraps(own)
    def decorated(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self)
        if not calls:
            return later  # a variable of its closure that has no value yet
        return (held[0] if hides else own)(self, *args, **options)

    held = [own]
    if hides:
        decorated.__wrapped__ = functools.wraps(own)(functools.partial(own))
    monkeypatch.setattr(attention, "forward", decorated)
    llm, ids = make_llm("Llama"), torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        before = llm(input_ids=ids).logits
        assert fuse_llm(llm)["rotary"] == (0 if hides else 2)
        assert relative(llm(input_ids=ids).logits, before) <= 1e-5
    assert len(calls) == 4
    later = None


def test_a_meta_model_is_fused_as_a_real_one() -> None:
    with torch.device("meta"):
        llm = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
        assert fuse_llm(llm) == {"rms_norm": 5, "swiglu": 2, "rotary": 2}


class _Limited(nn.Module):
    """An MLP that looks like LLaMA's and limits its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(x).clamp(max=7.0))
        return self.down_proj(gate * self.up_proj(x))  # type: ignore[no-any-return]


def test_an_mlp_with_a_limit_keeps_its_code() -> None:
    assert fuse_llm(_Limited())["swiglu"] == 0


def test_fused_forms_are_tried_and_named() -> None:
    ran = try_fused_kernels(torch.device("cpu"), torch.bfloat16)
    assert set(ran) == {"rms_norm", "swiglu", "rotary", "quick_gelu", "cross_entropy"}
    assert ran["swiglu"] == "torch, as written"
