"""Which LLMs are exact, how they are run, and that the check sees what it is there to see."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from llm_families import FAMILIES, tiny_config
from packs import relative
from transformers import AutoModelForCausalLM, LlamaConfig

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.model import OneLLMConfig, OneLLMForConditionalGeneration
from onellm_dist.model.attention import packed_attention
from onellm_dist.model.configuration import OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.llm import attention as llm_attention
from onellm_dist.model.llm import check as llm_check
from onellm_dist.model.llm.call import LLMSupport
from onellm_dist.model.llm.check import check_llm
from onellm_dist.model.llm.positions import get_context
from onellm_dist.model.llm.probe import GAINS, build_llm, own_context
from onellm_dist.packed import IGNORE, PackedBatch

LENGTHS = (19, 3, 11)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No result is known yet."""
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path))
    monkeypatch.setattr(llm_check, "_CHECKED", {})
    return tmp_path / "llm_check"


def make_model(text_config: Any) -> OneLLMForConditionalGeneration:
    """A OneLLM that reads text and the IMU, with large weights in the LLM."""
    config = OneLLMConfig(
        vision=OneLLMVisionConfig(width=32, layers=1, heads=2, output_dim=16),
        upm=OneLLMUPMConfig(experts=1, blocks=1, heads=2, ffn=32, router_hidden=16),
        text_config=text_config,
        modalities=["imu"],
    )
    model = OneLLMForConditionalGeneration(config)
    initialise(model, 0, skip=("llm.",))
    with own_context():
        state = build_llm(text_config, "eager", GAINS[0]).state_dict()
    model.llm.load_state_dict(state)
    model.train(mode=False)
    return model


def make_texts(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.cat([torch.tensor([1]), torch.randint(3, 97, (n - 1,), generator=generator)])
        for n in LENGTHS
    ]


def make_pack(texts: list[torch.Tensor]) -> PackedBatch:
    labels = [torch.where(torch.arange(len(t)) == 0, IGNORE, t) for t in texts]
    return PackedBatch(
        torch.cat(texts),
        torch.cat(labels),
        tuple(map(len, texts)),
        ((),) * len(texts),
        {"imu": torch.empty(0, 6, 400)},
        torch.ones(len(texts)),
    )


def run_own(model: OneLLMForConditionalGeneration, text: torch.Tensor) -> torch.Tensor:
    """Logits of a text by a plain eager LLM of transformers with the same weights."""
    config = copy.deepcopy(model.config.text_config)  # the attention is written into the config
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    llm.load_state_dict(model.llm.state_dict())  # a fresh LLM: `dynamic` remembers lengths
    logits: torch.Tensor = llm.eval()(input_ids=text[None], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.seconds
def test_a_pack_gives_what_the_llm_gives_for_each_sample_alone(family: str) -> None:
    model, texts = make_model(tiny_config(family)), make_texts()
    own = [run_own(model, text) for text in texts]
    with torch.no_grad():
        packed, _, _ = model.compute_packed_logits(make_pack(texts))
        longest = max(LENGTHS)
        for left in (True, False):
            ids = torch.zeros(3, longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, text in enumerate(texts):
                at = slice(longest - len(text), longest) if left else slice(0, len(text))
                ids[i, at], mask[i, at] = text, 1
            logits = model(ids, mask).logits
            for row, real, alone in zip(logits, mask.bool(), own, strict=True):
                assert relative(row[real], alone) < 1e-4
    for ours, alone in zip(packed.split([n - 1 for n in LENGTHS]), own, strict=True):
        assert relative(ours, alone[:-1]) < 1e-4
    if model.llm_support.generation:
        new = model.generate(ids[:, -3:], mask[:, -3:].fill_(1), max_new_tokens=2)
        assert new.shape == (3, 5)


def test_how_families_run() -> None:
    ways = {name: check_llm(tiny_config(name)) for name in FAMILIES}
    rows = {name for name, way in ways.items() if way.packing == "rows"}
    assert {"mamba", "falcon"} <= rows
    assert not rows & {
        "llama",
        "mistral",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "stablelm",
        "mixtral",
    }
    assert {name for name, way in ways.items() if way.position_limit} == {"gpt_neo", "opt", "gpt2"}
    assert ways["gpt2"].position_limit == ways["opt"].position_limit == 128


def test_an_llm_that_sees_later_tokens_is_refused_by_name() -> None:
    config = tiny_config("bert", type_vocab_size=2)
    with pytest.raises(
        UsageError, match=r"LLM bert cannot be used: a token sees the tokens after it"
    ):
        OneLLMConfig(text_config=config) and make_model(config)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("lost", ["seq_lengths", "window", "softcap", "sinks", "causal"])
def test_attention_that_forgets_something_is_noticed(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault is put into packed attention; the families that need it no longer run packed."""
    right = packed_attention

    def wrong(q: Any, k: Any, v: Any, seq_lengths: Any, **options: Any) -> Any:
        if lost == "seq_lengths":
            one = [sum(seq_lengths.q_lengths)]
            seq_lengths = type(seq_lengths).from_lengths(one, device=q.device)
        else:
            options[lost] = False if lost == "causal" else None
        return right(q, k, v, seq_lengths, **options)

    monkeypatch.setattr(llm_attention, "packed_attention", wrong)
    family = {"window": "mistral", "softcap": "gemma2", "sinks": "gpt_oss"}.get(lost, "llama")
    assert check_llm(tiny_config(family)).packing == "rows"


@pytest.mark.usefixtures("fresh")
def test_a_large_llm_is_checked_in_seconds_and_leaves_no_trace() -> None:
    config = LlamaConfig(
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=80,
        tie_word_embeddings=True,
    )
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), init_empty_weights():
            support = check_llm(config)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert support.packing == "varlen"
    assert torch.equal(torch.get_rng_state(), before)


def test_another_attention_after_opening_is_refused() -> None:
    model, pack = make_model(tiny_config("llama")), make_pack(make_texts())
    with pytest.raises(UsageError, match="set_attn_implementation"):
        model.set_attn_implementation("eager")
    model.set_attn_implementation("onellm_varlen")
    expected = model(packed=pack).loss
    model.llm.set_attn_implementation("eager")
    with pytest.raises(OneLLMError, match="changed to 'eager'"):
        model(packed=pack)
    with pytest.raises(OneLLMError, match="changed to 'eager'"):
        model(pack.input_ids[None])
    with pytest.raises(OneLLMError, match="changed to 'eager'"):
        model.generate(pack.input_ids[None], max_new_tokens=1)
    model.llm.set_attn_implementation("onellm_varlen")
    assert torch.equal(model(packed=pack).loss, expected)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_a_frozen_llm_has_no_dropout(family: str) -> None:
    changes = {"dropout": 0.5} if family == "opt" else {"resid_pdrop": 0.5, "attn_pdrop": 0.5}
    model, pack = make_model(tiny_config(family, **changes)), make_pack(make_texts())
    expected = model(packed=pack).loss
    model.llm.requires_grad_(False)
    model.train()
    assert torch.equal(model(packed=pack).loss, expected)
    model.llm.requires_grad_(True)
    if family == "gpt2":
        with pytest.raises(OneLLMError, match=r"attention dropout 0\.5"):
            model(packed=pack)
    else:
        assert not torch.equal(model(packed=pack).loss, model(packed=pack).loss)
    model.llm.requires_grad_(False)
    assert torch.equal(model(packed=pack).loss, expected)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_text_longer_than_the_table_of_positions_is_refused_in_words(family: str) -> None:
    """The table of opt has two rows more, for padding."""
    model = make_model(tiny_config(family))
    text = torch.ones(129, dtype=torch.int64)
    with torch.no_grad():
        model(packed=make_pack([text[:128]]))
        with pytest.raises(UsageError, match=r"129 positions.*\n.*128 positions"):
            model(packed=make_pack([text]))
        with pytest.raises(UsageError, match="129 positions"):
            model(text[None])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_prompt_media_and_new_tokens_longer_than_the_context_are_refused(family: str) -> None:
    model = make_model(tiny_config(family))
    prompt, imu = torch.ones(1, 90, dtype=torch.int64), torch.zeros(1, 6, 400)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert get_context(model.config.text_config, model.llm_support) == 128
    new = model.generate(prompt, imu_values=imu, max_new_tokens=6, **options)
    assert new.shape == (1, 96)
    says = rf"129 positions \(122 \+ 7\)\n.*{type(model.llm).__name__} has 128.*\n.*at most 6 new"
    lengths: list[dict[str, Any]] = [{"max_new_tokens": 7}, {"max_length": 97}]
    for length in lengths:
        with pytest.raises(UsageError, match=says):
            model.generate(prompt, imu_values=imu, **length, **options)
    with pytest.raises(UsageError, match="shorten the prompt"):
        model.generate(prompt.repeat(1, 2), max_new_tokens=1, **options)


def test_a_table_of_positions_whose_first_rows_are_no_positions() -> None:
    """As RoBERTa, which counts positions from behind the id of its padding token."""
    for pad in (1, 3):
        config = tiny_config("roberta", is_decoder=True, pad_token_id=pad)
        limit = check_llm(config).position_limit
        assert limit == 128 - 1 - pad
        llm = AutoModelForCausalLM.from_config(config)
        text = torch.full((1, limit + 1), 5)
        assert llm(text[:, :limit]).logits.shape[1] == limit
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
            llm(text)


def test_the_context_of_scaled_rope_is_the_scaled_one() -> None:
    def find(rope: dict[str, Any], positions: int = 128) -> int | None:
        rope = {"rope_theta": 1e4, **rope}
        config = tiny_config("llama", max_position_embeddings=positions, rope_parameters=rope)
        return get_context(config, LLMSupport())

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert find(yarn) == find(yarn, 512) == 512
    assert find({"rope_type": "linear", "factor": 2.0}) == 256
    assert find({"rope_type": "dynamic", "factor": 2.0}) == 256
    assert find({"rope_type": "default"}) == 128
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **yarn, "rope_type": "llama3"}
    assert find(llama3, 256) == 256
    assert get_context(tiny_config("mamba"), LLMSupport()) is None
    assert get_context(tiny_config("gpt2"), LLMSupport(position_limit=126)) == 126


def test_activation_checkpointing_knows_the_samples() -> None:
    """Layers of stablelm pass no arguments on: its mask must say where samples end."""
    model, pack = make_model(tiny_config("stablelm")), make_pack(make_texts())
    model.train()
    plain = torch.autograd.grad(model(packed=pack).loss, list(model.llm.parameters()))
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(model(packed=pack).loss, list(model.llm.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
