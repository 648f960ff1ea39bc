"""Our own formats keep everything in both directions; what contradicts is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama, onellm, save_meta
from transformers import AutoConfig, LlamaConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.names.llama_params import build_llama_config, build_params, check_params
from onellm_dist.convert.opening import open_checkpoint
from onellm_dist.convert.sidecar import SIDECAR
from onellm_dist.convert.verify import compare
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.model.processing.processor import OneLLMProcessor

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ENDS = {"eos_token_id": [2, 7, 9], "max_new_tokens": 31}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A onellm with heads of 16 channels, 1234 positions and three end tokens, as reference."""
    model = onellm()
    model.config.text_config.max_position_embeddings = 1234
    model.save_pretrained(tmp_path / "one")
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "generation_config.json").write_text(json.dumps(ENDS))
    convert("onellm", tmp_path / "one", tmp_path / "back", to="reference", quiet=True)
    return tmp_path


@pytest.mark.seconds
def test_onellm_to_reference_and_back_is_the_same_model(written: Path) -> None:
    convert("reference", written / "back", written / "again", quiet=True)
    first, again = open_checkpoint(written / "one"), open_checkpoint(written / "again")
    assert compare(first, again, logits=True).is_equal(0)
    for part in ("vision", "upm", "text_config"):
        assert getattr(first.config, part).to_dict() == getattr(again.config, part).to_dict()
    assert json.loads((written / "again" / "generation_config.json").read_text()) == ENDS
    assert (written / "again" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ConversionOptions(encoder_heads=8), "--encoder-heads=8, but"),
        (ConversionOptions(upm_heads=8), "--upm-heads=8, but"),
        (ConversionOptions(llm_heads=8), "--llm-heads=8, but"),
    ],
)
def test_options_do_not_override_what_is_stated(
    options: ConversionOptions, words: str, written: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        open_checkpoint(written / "back", options)


def test_files_that_contradict_each_other(written: Path) -> None:
    folder = written / "back"
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-6}))
    with pytest.raises(UsageError, match=rf"norm_eps is 1e-06, {SIDECAR} says 1e-05"):
        open_checkpoint(folder)
    (folder / "params.json").unlink()
    assert open_checkpoint(folder).config.vision.heads == 4
    content = json.loads((folder / SIDECAR).read_text())
    content["config"]["upm"]["ffn"] = 64
    (folder / SIDECAR).write_text(json.dumps(content))
    with pytest.raises(UsageError, match="UPM ffn is 96"):
        open_checkpoint(folder)
    (folder / SIDECAR).write_text("[]")
    with pytest.raises(UsageError, match="cannot be read"):
        open_checkpoint(folder)


def test_hf_to_meta_and_back_keeps_positions_and_end_tokens(tmp_path: Path) -> None:
    model = llama(kv_heads=2)
    model.config.max_position_embeddings = 1111
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(ENDS))
    convert("hf", tmp_path / "hf", tmp_path / "meta", quiet=True)
    convert("meta-llama", tmp_path / "meta", tmp_path / "again", quiet=True)
    before, after = (AutoConfig.from_pretrained(tmp_path / name) for name in ("hf", "again"))
    assert before.to_diff_dict() == after.to_diff_dict()
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == ENDS


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**llama().config.to_dict(), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor 2.0"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 8.0}}, "high_freq_factor 8.0"),
        (
            {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 4096}},
            "original_max_position_embeddings 4096",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type linear",
        ),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"attention_bias": True}, "biases in attention"),
        ({"mlp_bias": True}, "biases in the MLP"),
        ({"head_dim": 32}, "heads of 32 channels"),
    ],
)
def test_what_metas_code_computes_otherwise_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_params(config(**changes))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_survives_params_json(factor: float) -> None:
    stated = config(rope_parameters={**LLAMA3, "factor": factor})
    shapes = {
        "tok_embeddings.weight": (stated.vocab_size, 64),
        "layers.0.attention.wq.weight": (64, 64),
        "layers.0.attention.wk.weight": (64, 64),
        "layers.0.feed_forward.w1.weight": (176, 64),
        "layers.1.attention.wq.weight": (64, 64),
    }
    params = check_params(json.loads(json.dumps(build_params(stated))), "params.json")
    assert build_llama_config(params, shapes, "x").rope_parameters == stated.rope_parameters


@pytest.mark.parametrize(
    "params",
    [
        {"sliding_window": 4096},
        {"moe": {"num_experts": 8}},
        {"quantization_args": {"group_size": 32}},
        {"n_heads": "four"},
        {"norm_eps": -1},
        {"use_scaled_rope": "yes"},
        ["dim", 64],
    ],
)
def test_params_that_would_be_lost_are_refused(params: Any, tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", llama())
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(UsageError, match=r"params\.json"):
        open_checkpoint(folder)


def test_a_rotary_table_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = save_meta(tmp_path / "meta", llama())
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "rope_theta": 1e6}))
    with pytest.raises(UsageError, match="rotary table"):
        open_checkpoint(folder)
