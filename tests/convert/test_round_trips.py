"""Every format in and out: bit for bit, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    clip,
    llama,
    meta_state,
    onellm,
    parity_weights,
    save_meta,
    save_onellm,
    save_open_clip,
    split,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CLIPVisionModelWithProjection

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.extend import Additions, extend_model
from onellm_dist.convert.inspect import describe_checkpoint
from onellm_dist.convert.opening import open_checkpoint
from onellm_dist.convert.sidecar import SIDECAR
from onellm_dist.convert.verify import build_model, compare
from onellm_dist.model import (
    OneLLMConfig,
    OneLLMForConditionalGeneration,
    OneLLMProcessor,
    load_model,
)
from onellm_dist.model.encoder import Encoder
from onellm_dist.model.presets import load_toy_tokenizer

Tensors = dict[str, torch.Tensor]
HEADS = ConversionOptions(encoder_heads=4, upm_heads=4, llm_heads=4)
SMALL = 100_000
"""Bytes a file, so that outputs have several."""


def same(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def load_folder(folder: Path) -> Tensors:
    return {
        name: t
        for file in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


@pytest.mark.seconds
def test_reference_there_and_back_is_bit_identical(tmp_path: Path) -> None:
    """fp16 of the encoder included; only the dead keys of CLIP's text tower are gone."""
    weights = parity_weights()
    torch.save(weights, tmp_path / "consolidated.00-of-01.pth")
    options = ConversionOptions(encoder_heads=4, upm_heads=4, llm_heads=4, shard_bytes=SMALL)
    opened, record = convert(
        "reference",
        tmp_path / "consolidated.00-of-01.pth",
        tmp_path / "ours",
        options=options,
        quiet=True,
    )
    _, back = convert("onellm", tmp_path / "ours", tmp_path / "back", quiet=True)
    again = torch.load(tmp_path / "back" / "consolidated.00-of-01.pth", weights_only=True)
    live = {key: value for key, value in weights.items() if key not in opened.ignored}
    assert len(opened.ignored) == 6
    same(again, live)
    assert len(record["result"]) > 3
    assert back["source"][0]["sha256"] == record["result"][0]["sha256"]
    assert json.loads((tmp_path / "back" / "params.json").read_text())["n_heads"] == 4


@pytest.mark.parametrize("kind", ["fixed", "learned"])
def test_span_positions_go_there_and_back(kind: str, tmp_path: Path) -> None:
    """In the reference's file too, and without the config beside it where shapes say it."""
    model = onellm(span_positions=kind)
    for name, parameter in model.named_parameters():
        if "span_positions" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "ours")
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(tmp_path / "ours")
    convert("onellm", tmp_path / "ours", tmp_path / "there", to="reference", quiet=True)
    convert("reference", tmp_path / "there", tmp_path / "back", quiet=True)
    assert OneLLMConfig.from_pretrained(tmp_path / "back").span_positions == kind
    same(load_folder(tmp_path / "back"), load_folder(tmp_path / "ours"))
    (tmp_path / "there" / SIDECAR).unlink()
    alone = open_checkpoint(tmp_path / "there", HEADS, "reference")
    assert alone.config.span_positions == ("learned" if kind == "learned" else "none")
    assert not alone.problems
    lines = describe_checkpoint(open_checkpoint(tmp_path / "back", ConversionOptions()))
    assert f"span positions: {kind}" in lines
    ours = open_checkpoint(tmp_path / "back", ConversionOptions())
    assert extend_model(ours, Additions(modalities=["audio"]), 0).config.span_positions == kind


@pytest.mark.seconds
def test_model_parallel_reference_is_the_same(tmp_path: Path) -> None:
    weights = parity_weights()
    torch.save(weights, tmp_path / "complete.pth")
    (tmp_path / "parts").mkdir()
    for rank, part in enumerate(split(weights, 2)):
        torch.save(part, tmp_path / "parts" / f"consolidated.{rank:02d}-of-02.pth")
    found = compare(
        open_checkpoint(tmp_path / "parts", HEADS),
        open_checkpoint(tmp_path / "complete.pth", HEADS),
    )
    assert found.is_equal(0)
    assert found.same > 100
    (tmp_path / "parts" / "consolidated.01-of-02.pth").unlink()
    with pytest.raises(UsageError, match="1 of 2 model-parallel files are missing: numbers 1"):
        open_checkpoint(tmp_path / "parts", HEADS, "reference")


@pytest.mark.parametrize(
    ("kv_heads", "tied", "ranks", "by_words"),
    [(4, False, 1, False), (2, False, 2, False), (2, False, 2, True), (4, True, 1, False)],
)
def test_meta_llama_there_and_back(
    kv_heads: int, tied: bool, ranks: int, by_words: bool, tmp_path: Path
) -> None:
    """Both directions bit for bit: grouped heads, tied embeddings, two ranks; equal logits."""
    model = llama(kv_heads=kv_heads, tied=tied)
    save_meta(tmp_path / "meta", model, ranks=ranks, by_words=by_words)
    convert(
        "meta-llama",
        tmp_path / "meta",
        tmp_path / "hf",
        options=ConversionOptions(shard_bytes=SMALL),
        quiet=True,
    )
    ids = torch.arange(3, 30)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.config.tie_word_embeddings is tied
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    same(dict(loaded.state_dict()), dict(model.state_dict()))
    convert("hf", tmp_path / "hf", tmp_path / "back", quiet=True)
    same(
        torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True), meta_state(model)
    )
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert (params["n_heads"], params["n_kv_heads"], params["multiple_of"]) == (4, kv_heads, 176)
    with torch.no_grad():
        assert torch.equal(
            build_model(open_checkpoint(tmp_path / "back", ConversionOptions()))(ids).logits,
            model(ids).logits,
        )


def test_hf_of_bin_files_with_an_index_and_old_buffers(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "hf")
    frequencies = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    state = {**model.state_dict(), buffer: frequencies}
    (tmp_path / "hf" / "model.safetensors").unlink()
    halves = [dict(list(state.items())[:7]), dict(list(state.items())[7:])]
    places: dict[str, str] = {}
    for i, half in enumerate(halves):
        torch.save(half, tmp_path / "hf" / f"pytorch_model-{i}.bin")
        places |= dict.fromkeys(half, f"pytorch_model-{i}.bin")
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    opened, _ = convert("hf", tmp_path / "hf", tmp_path / "out", to="hf", quiet=True)
    assert set(opened.ignored) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    same(
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()),
        dict(model.state_dict()),
    )


def test_the_llm_of_a_onellm_as_hf(tmp_path: Path) -> None:
    save_onellm(tmp_path / "one")
    convert("onellm", tmp_path / "one", tmp_path / "hf", to="hf", quiet=True)
    model = OneLLMForConditionalGeneration.from_pretrained(tmp_path / "one")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits,
            model(ids).logits,
            atol=1e-5,
        )
    same(load_folder(tmp_path / "hf"), dict(model.llm.state_dict()))


def encoded(encoder: Encoder, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return encoder.encode_images(image)


def test_open_clip_and_hf_clip_give_the_towers_own_outputs(tmp_path: Path) -> None:
    folder, tower = save_open_clip(tmp_path / "clip")
    image = torch.randn(1, 3, 224, 224)
    opened = open_checkpoint(folder, ConversionOptions())
    encoder = Encoder(opened.config)
    encoder.load_state_dict({n: t.read() for n, t in opened.tensors.items()})
    tokens = encoded(encoder, image)
    with torch.no_grad():
        pooled = tokens[:, 0] @ encoder.proj.weight
        assert torch.allclose(pooled, tower(image), atol=1e-5)
    convert("open-clip", folder, tmp_path / "hf", quiet=True)
    theirs = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert torch.allclose(theirs(image).image_embeds, tower(image), atol=1e-5)
    convert("hf-clip", tmp_path / "hf", tmp_path / "back", quiet=True)
    same(
        load_file(tmp_path / "back" / "open_clip_model.safetensors"),
        {f"visual.{k}": v for k, v in tower.state_dict().items()},
    )
    assert compare(
        open_checkpoint(tmp_path / "hf", ConversionOptions()),
        open_checkpoint(tmp_path / "back", ConversionOptions()),
    ).is_equal(0)


def test_a_clip_file_must_say_its_activation(tmp_path: Path) -> None:
    _, tower = save_open_clip(tmp_path / "clip")
    state = {
        **{f"visual.{k}": v for k, v in tower.state_dict().items()},
        "logit_scale": torch.tensor(1.0),
        "transformer.x": torch.ones(2),
    }
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "vit.pt")
    with pytest.raises(UsageError, match="does not state its activation"):
        open_checkpoint(tmp_path / "vit.pt", ConversionOptions(), "open-clip")
    opened = open_checkpoint(
        tmp_path / "vit.pt", ConversionOptions(act="quick_gelu", encoder_heads=4), "open-clip"
    )
    assert set(opened.ignored) == {"logit_scale", "transformer.x"}
    assert compare(opened, open_checkpoint(tmp_path / "clip", ConversionOptions())).is_equal(0)


def test_openais_torchscript_file_is_read_without_running_it(tmp_path: Path) -> None:
    """OpenAI's .pt are TorchScript archives: modules as attributes, half precision."""

    class Tower(torch.nn.Module):
        def __init__(self, visual: Any) -> None:
            super().__init__()
            self.visual = visual.half()
            self.logit_scale = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            convolved: torch.Tensor = self.visual.conv1(x)
            return convolved

    _, tower = save_open_clip(tmp_path / "clip")
    model = Tower(tower)
    torch.jit.trace(model, torch.randn(1, 3, 224, 224).half()).save(str(tmp_path / "ViT.pt"))
    opened = open_checkpoint(tmp_path / "ViT.pt", ConversionOptions(encoder_heads=4))
    assert opened.config.act == "quick_gelu"
    assert not opened.problems
    assert all(t.dtype == torch.float16 for t in opened.tensors.values())
    assert torch.equal(opened.tensors["proj.weight"].read(), tower.state_dict()["proj"].half())


def test_a_gguf_file_gives_transformers_own_weights(tmp_path: Path) -> None:
    """A llama written as GGUF against transformers' own reader.

    Rows of q and k are in Meta's order, as llama.cpp keeps them.
    """
    gguf = pytest.importorskip("gguf")
    model = llama(kv_heads=2)
    state, meta, config = model.state_dict(), meta_state(model), model.config
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(176)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}
    writer.add_tensor(names["embed_tokens"], state["model.embed_tokens.weight"].numpy())
    writer.add_tensor(names["norm"], state["model.norm.weight"].numpy())
    writer.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for i in range(2):
        for theirs, ours in (
            ("attn_q", "attention.wq"),
            ("attn_k", "attention.wk"),
            ("attn_v", "attention.wv"),
            ("attn_output", "attention.wo"),
            ("ffn_gate", "feed_forward.w1"),
            ("ffn_down", "feed_forward.w2"),
            ("ffn_up", "feed_forward.w3"),
            ("attn_norm", "attention_norm"),
            ("ffn_norm", "ffn_norm"),
        ):
            writer.add_tensor(f"blk.{i}.{theirs}.weight", meta[f"layers.{i}.{ours}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert("gguf", tmp_path / "m.gguf", tmp_path / "hf", quiet=True)
    expected: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    same(dict(loaded.state_dict()), dict(expected.state_dict()))
    same(dict(loaded.state_dict()), dict(state))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_dtype_is_cast_and_the_directory_loads(tmp_path: Path) -> None:
    save_onellm(tmp_path / "one")
    convert(
        "onellm",
        tmp_path / "one",
        tmp_path / "half",
        to="onellm",
        options=ConversionOptions(dtype=torch.bfloat16),
        quiet=True,
    )
    model, processor = load_model(path=tmp_path / "half", preset=None, seed=0)
    wanted = onellm().bfloat16().state_dict()
    assert all(torch.equal(v.bfloat16(), wanted[n]) for n, v in model.named_parameters())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert processor.tokenizer.bos_token_id == 1
    card = (tmp_path / "half" / "README.md").read_text()
    assert "Licences" in card
    assert "| llm |" in card


def test_clip_of_another_activation_keeps_it(tmp_path: Path) -> None:
    clip(act="gelu").save_pretrained(tmp_path / "clip")
    convert("hf-clip", tmp_path / "clip", tmp_path / "open", quiet=True)
    opened = open_checkpoint(tmp_path / "open", ConversionOptions())
    assert (opened.config.act, opened.config.heads) == ("gelu", 4)
    assert compare(opened, open_checkpoint(tmp_path / "clip", ConversionOptions())).is_equal(0)


def test_what_a_clips_folder_says_beside_its_weights_is_kept(tmp_path: Path) -> None:
    """Epsilon, pixels and heads change every number; an unknown key might."""
    clip().save_pretrained(tmp_path / "clip")
    path = tmp_path / "clip" / "config.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps({**stated, "layer_norm_eps": 1e-6}))
    pixels = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(pixels))
    config = open_checkpoint(tmp_path / "clip").config
    assert (config.norm_eps, config.image_mean, config.image_std) == (1e-6, *pixels.values())
    with pytest.raises(UsageError, match="--encoder-heads=8, but"):
        open_checkpoint(tmp_path / "clip", ConversionOptions(encoder_heads=8))
    path.write_text(json.dumps(stated))
    convert("hf-clip", tmp_path / "clip", tmp_path / "open", quiet=True)
    again = open_checkpoint(tmp_path / "open")
    assert (again.config.image_mean, again.config.image_std) == tuple(pixels.values())
    path = tmp_path / "open" / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["vision_cfg"]["attentional_pool"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="attentional_pool=True"):
        convert("open-clip", tmp_path / "open", tmp_path / "out", quiet=True)
