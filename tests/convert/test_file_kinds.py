"""Files that cannot be converted are called what they are; names are matched as by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import clip, llama
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.assemble import assemble
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.folder_kinds import refuse_impossible_sizes
from onellm_dist.convert.opening import open_checkpoint

FILES = {
    "torch.save as before torch 1.6": None,
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "HTML page": b"\n<!DOCTYPE html><html>404",
    "XML text": b"<?xml version='1.0'?><Error/>",
    "JSON text": b'{"error": "gated"}',
    "empty": b"",
    "made of zeros": bytes(5000),
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(20),
    "a GGUF file": b"GGUF\x03\0\0\0" + bytes(20),
    "from before GGUF": b"tjgg" + bytes(20),
    "NumPy": b"\x93NUMPY" + bytes(20),
    "a pickle, not": b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("words", FILES)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_is_called_what_it_is(words: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    content = FILES[words]
    if content is None:
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        convert("reference", path, tmp_path / "out", quiet=True)


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def make_adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    content = {"peft_type": "LORA", "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def quantise(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors")


def keep_only(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return change


FOLDERS: dict[str, Callable[[Path], None]] = {
    r"an adapter \(LORA\) over base": make_adapter,
    r"quantised \(gptq\)": rewrite(quantization_config={"quant_method": "gptq"}),
    r"quantised \(bitsandbytes\)": rewrite(quantization_config={"quant_method": "bitsandbytes"}),
    "stored as float8_e4m3fn: codes": quantise,
    "parts of its own for pictures": rewrite(vision_config={}, architectures=["XForCausalLM"]),
    "an encoder-decoder": rewrite(is_encoder_decoder=True),
    r"code of its own \(auto_map\)": rewrite(model_type="strange", auto_map={"AutoConfig": "x.Y"}),
    "TensorFlow weights": keep_only("tf_model.h5"),
    "Flax weights": keep_only("flax_model.msgpack"),
    "no model is that large": rewrite(num_hidden_layers=2**64),
    "num_attention_heads=5000": rewrite(num_attention_heads=5000),
    "max_position_embeddings=1e\\+30": rewrite(max_position_embeddings=1e30),
}


@pytest.mark.parametrize("words", FOLDERS)
def test_a_folder_is_called_what_it_is(words: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "hf")
    FOLDERS[words](tmp_path / "hf")
    with pytest.raises(UsageError, match=words):
        convert("hf", tmp_path / "hf", tmp_path / "out", to="hf", quiet=True)
    assert not (tmp_path / "out").exists()


LARGE = {"layers": 4097, "n_layer": 4097, "num_kv_heads": 10**5, "n_routed_experts": 10**6}


@pytest.mark.parametrize("key", LARGE)
def test_counts_beyond_any_model_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{key}={LARGE[key]}"):
        refuse_impossible_sizes(tmp_path, {"text_config": [{key: LARGE[key]}]})


@pytest.mark.parametrize("family", ["qwen2_moe", "gemma3n_text", "nemotron_h", "doge"])
def test_sizes_named_like_counts_are_no_counts(family: str, tmp_path: Path) -> None:
    """5632 units of a shared expert, 262,144 tokens per layer, 16,384 experts."""
    refuse_impossible_sizes(tmp_path, CONFIG_MAPPING[family]().to_dict())


@pytest.mark.slow
def test_every_family_of_transformers_has_possible_sizes(tmp_path: Path) -> None:
    checked = 0
    for family in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[family]().to_dict()
        except Exception:  # it needs a package or a value that is not given here
            continue
        refuse_impossible_sizes(tmp_path, json.loads(json.dumps(config, default=str)))
        checked += 1
    assert checked > 0.9 * len(CONFIG_MAPPING)


def gpt2(folder: Path) -> Any:
    """As on the Hub: no prefix, and causal masks among the weights."""
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    save_file({**state, "h.0.attn.bias": torch.ones(1, 1, 32, 32)}, folder / "model.safetensors")
    return model


def pythia(folder: Path) -> Any:
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(folder)
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    return model


def mixture(folder: Path) -> Any:
    """save_pretrained writes one tensor per expert; the model has one for all."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    assert any(".experts.3." in name for name in load_file(folder / "model.safetensors"))
    return model


@pytest.mark.parametrize("make", [gpt2, pythia, mixture])
def test_names_are_matched_as_from_pretrained_does(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    model = make(tmp_path / "hf")
    convert("hf", tmp_path / "hf", tmp_path / "out", to="hf", quiet=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_mixture_of_experts_is_assembled_and_lacks_nothing_unseen(tmp_path: Path) -> None:
    model = mixture(tmp_path / "hf")
    clip().save_pretrained(tmp_path / "clip")
    out = tmp_path / "one"
    assemble(out, llm=tmp_path / "hf", encoder=tmp_path / "clip", modalities=["image"], quiet=True)
    opened = open_checkpoint(out)
    assert all(
        torch.equal(opened.tensors[f"llm.{name}"].read(), value)
        for name, value in model.named_parameters()
    )
    shutil.copytree(tmp_path / "hf", tmp_path / "lacking")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state = {name: t for name, t in state.items() if ".experts.3.down_proj" not in name}
    save_file(state, tmp_path / "lacking" / "model.safetensors")
    with pytest.raises(UsageError, match=r"mismatched key .*experts\.down_proj"):
        convert("hf", tmp_path / "lacking", tmp_path / "x", to="hf", quiet=True)


def test_a_tied_head_that_differs_is_refused_whatever_the_family(tmp_path: Path) -> None:
    model = gpt2(tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    head = model.lm_head.weight.detach().clone()
    save_file({**state, "lm_head.weight": head}, tmp_path / "hf" / "model.safetensors")
    convert("hf", tmp_path / "hf", tmp_path / "out", to="hf", quiet=True)
    save_file({**state, "lm_head.weight": head + 1}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UsageError, match=r"differs from transformer\.wte\.weight"):
        convert("hf", tmp_path / "hf", tmp_path / "two", to="hf", quiet=True)
