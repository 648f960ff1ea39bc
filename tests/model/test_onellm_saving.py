"""save_pretrained, from_pretrained and the Auto classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packs import make_pack, small_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, Qwen2Config

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.model import (
    OneLLMConfig,
    OneLLMForConditionalGeneration,
    OneLLMProcessor,
    load_model,
)
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.presets import load_toy_tokenizer


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_a_saved_model_comes_back_the_same(auto: Any, tmp_path: Path) -> None:
    model = small_model(seed=5, router="sparse", modalities=["imu", "image"])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = auto.from_pretrained(tmp_path)
    assert isinstance(again, OneLLMForConditionalGeneration)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert again.config.modalities == ["image", "imu"]
    assert AutoConfig.from_pretrained(tmp_path).upm.router == "sparse"
    pack = make_pack([("imu",), ("image",), ()], [4, 5, 6])
    pack = type(pack)(
        pack.input_ids,
        pack.labels,
        pack.text_token_counts,
        pack.modalities,
        {m: pack.values[m] for m in ("imu", "image")},
        pack.weights,
    )
    assert torch.equal(again.train()(packed=pack).nll, model(packed=pack).nll)
    assert not any(p.requires_grad for p in again.encoder.parameters())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    config = small_model().config
    config = OneLLMConfig(
        vision=config.vision,
        upm=config.upm,
        text_config=Qwen2Config(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        modalities=["imu"],
    )
    model = OneLLMForConditionalGeneration(config)
    initialise(model, 0)
    model.save_pretrained(tmp_path)
    again = OneLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight
    pack = make_pack([("imu",)], [4])
    pack = type(pack)(
        pack.input_ids,
        pack.labels,
        pack.text_token_counts,
        pack.modalities,
        {"imu": pack.values["imu"]},
        pack.weights,
    )
    assert torch.equal(again(packed=pack).nll, model(packed=pack).nll)


@pytest.mark.parametrize("fault", ["missing", "unknown"])
def test_weights_that_do_not_fit_are_refused_with_their_names(fault: str, tmp_path: Path) -> None:
    small_model(modalities=["imu"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    if fault == "missing":
        del (
            state["upm.experts.1.blocks.0.attention.q.weight"],
            state["tokenizers.imu.positions.weight"],
        )
        names = ["upm.experts.1.blocks.0.attention.q.weight", "tokenizers.imu.positions.weight"]
    else:
        state["upm.experts.3.blocks.0.attention.q.weight"] = torch.zeros(32, 32)
        names = ["upm.experts.3.blocks.0.attention.q.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(OneLLMError, match="do not fit the config") as caught:
        OneLLMForConditionalGeneration.from_pretrained(tmp_path)
    assert all(name in str(caught.value) for name in names)


def test_a_whole_directory(tmp_path: Path) -> None:
    model, processor = load_model(path=None, preset="toy", seed=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no tokenizer in"):
        load_model(path=tmp_path, preset=None, seed=0)
    processor.save_pretrained(tmp_path)
    again, processor = load_model(path=tmp_path, preset=None, seed=0, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), OneLLMProcessor)
    text = "a red circle"
    assert processor.tokenizer(text)["input_ids"] == load_toy_tokenizer()(text)["input_ids"]
