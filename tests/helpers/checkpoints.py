"""Small checkpoints of every format, for the tests of conversion."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
)

from onellm_dist.common.checksums import seal
from onellm_dist.common.files import sha256_file
from onellm_dist.model import OneLLMConfig, OneLLMForConditionalGeneration, OneLLMProcessor
from onellm_dist.model.configuration import OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.presets import load_toy_tokenizer

DATA = Path(__file__).parent.parent / "fixtures" / "parity"
Tensors = dict[str, torch.Tensor]
TRAINED = ("upm.", "projectors.", "tokenizers.")


def parity_weights() -> Tensors:
    """The reference's small checkpoint, the encoder in fp16 as the reference keeps it."""
    spec = importlib.util.spec_from_file_location("parity_weights", DATA / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built: Tensors = module.weights(DATA / "manifest.json")
    return {
        key: value.half() if key.startswith("llma.clip.") else value for key, value in built.items()
    }


def llama(*, kv_heads: int = 4, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,  # as many as the toy tokenizer
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def clip(*, act: str = "quick_gelu") -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=56,
        hidden_act=act,
    )
    model = CLIPVisionModelWithProjection(config)
    model.eval()
    return model


def onellm(
    *,
    modalities: tuple[str, ...] = ("image", "imu"),
    experts: int = 2,
    router: str = "soft",
    seed: int = 0,
    span_positions: str = "none",
) -> OneLLMForConditionalGeneration:
    config = OneLLMConfig(
        vision=OneLLMVisionConfig(width=64, layers=1, heads=4, patch_size=56, output_dim=32),
        upm=OneLLMUPMConfig(
            experts=experts, blocks=1, heads=4, ffn=96, router_hidden=48, router=router
        ),
        text_config=llama().config,
        modalities=modalities,
        span_positions=span_positions,
    )
    model = OneLLMForConditionalGeneration(config)
    initialise(model, seed)
    model.train(mode=False)
    return model


def save_onellm(folder: Path, **arguments: Any) -> Path:
    onellm(**arguments).save_pretrained(folder)
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(folder)
    return folder


def meta_state(model: LlamaForCausalLM) -> Tensors:
    """Meta's layout of a LLaMA, written down from Meta's code.

    Rotary channels are (2i, 2i + 1) instead of (i, i + half).
    """
    state = model.state_dict()
    config: Any = model.config

    def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
        rows = weight.shape[0] // heads
        order = [
            head * rows + half * (rows // 2) + i
            for head in range(heads)
            for i in range(rows // 2)
            for half in (0, 1)
        ]
        return weight[order]

    found = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
    }
    found["output.weight"] = state["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        layer, ours = f"layers.{i}", f"model.layers.{i}"
        found[f"{layer}.attention.wq.weight"] = pairs(
            state[f"{ours}.self_attn.q_proj.weight"], config.num_attention_heads
        )
        found[f"{layer}.attention.wk.weight"] = pairs(
            state[f"{ours}.self_attn.k_proj.weight"], config.num_key_value_heads
        )
        found[f"{layer}.attention.wv.weight"] = state[f"{ours}.self_attn.v_proj.weight"]
        found[f"{layer}.attention.wo.weight"] = state[f"{ours}.self_attn.o_proj.weight"]
        found[f"{layer}.feed_forward.w1.weight"] = state[f"{ours}.mlp.gate_proj.weight"]
        found[f"{layer}.feed_forward.w2.weight"] = state[f"{ours}.mlp.down_proj.weight"]
        found[f"{layer}.feed_forward.w3.weight"] = state[f"{ours}.mlp.up_proj.weight"]
        found[f"{layer}.attention_norm.weight"] = state[f"{ours}.input_layernorm.weight"]
        found[f"{layer}.ffn_norm.weight"] = state[f"{ours}.post_attention_layernorm.weight"]
    return {key: value.clone() for key, value in found.items()}


def split(state: Tensors, ranks: int, *, by_words: bool = False) -> list[Tensors]:
    """Model-parallel parts of a state in Meta's or the reference's names, as of fairscale."""
    parts: list[Tensors] = [{} for _ in range(ranks)]
    for key, value in state.items():
        bare = key.removeprefix("llma.")
        if bare == "tok_embeddings.weight":
            dim: int | None = 0 if by_words else 1
        elif bare == "output.weight" or bare.endswith(
            (".wq.weight", ".wk.weight", ".wv.weight", ".w1.weight", ".w3.weight")
        ):
            dim = 0
        else:
            dim = 1 if bare.endswith((".wo.weight", ".w2.weight")) else None
        pieces = [value] * ranks if dim is None else value.chunk(ranks, dim)
        for part, piece in zip(parts, pieces, strict=True):
            part[key] = piece.clone()
    return parts


def save_meta(
    folder: Path, model: LlamaForCausalLM, *, ranks: int = 1, by_words: bool = False
) -> Path:
    folder.mkdir(parents=True)
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    table = 1.0 / (10000.0 ** (torch.arange(0, width, 2).float() / width))
    for rank, part in enumerate(split(meta_state(model), ranks, by_words=by_words)):
        torch.save({**part, "rope.freqs": table}, folder / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": -1,
        "multiple_of": 176,
        "norm_eps": 1e-5,
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def open_clip_state() -> tuple[torch.nn.Module, Tensors]:
    """open_clip's own small ViT and its state dict."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    torch.manual_seed(2)
    tower = _build_vision_tower(
        32,
        CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=56, image_size=224),
        quick_gelu=True,
    )
    return tower.eval(), {f"visual.{k}": v for k, v in tower.state_dict().items()}


def save_open_clip(folder: Path) -> tuple[Path, torch.nn.Module]:
    tower, state = open_clip_state()
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    vision = {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 56}
    about = {"model_cfg": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return folder, tower


def trained_weights() -> Tensors:
    """Other weights for what aligns: those of another seed."""
    return {n: p.detach() for n, p in onellm(seed=9).named_parameters() if n.startswith(TRAINED)}


def save_run(
    run: Path,
    base: Path,
    ranks: int,
    *,
    precision: str = "bf16",
    first_version: bool = False,
    rows: Tensors | None = None,
    spans: dict[str, int] | None = None,
    recorded_spans: dict[str, int] | None = None,
) -> Path:
    """A checkpoint as train/checkpoint/folder.py describes it.

    Each rank holds a range of every parameter; the last ranks may hold none. `rows` trained too.
    """
    folder = run / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    parameters: dict[str, Any] = {}
    files: dict[str, int] = {}
    for rank in range(ranks):
        held, file = {}, f"rank-{rank:05d}.safetensors"
        for name, weight in {**trained_weights(), **(rows or {})}.items():
            each = -(-weight.numel() // ranks)
            start, end = min(rank * each, weight.numel()), min((rank + 1) * each, weight.numel())
            if start == end:
                continue
            for key, factor in (("master", 1.0), ("exp_avg", 7.0), ("exp_avg_sq", 9.0)):
                held[f"{name}:{start}:{key}"] = weight.flatten()[start:end] * factor
            parameters.setdefault(name, {"shape": list(weight.shape), "pieces": []})[
                "pieces"
            ].append([start, end - start, file])
        save_file(held, folder / file)
        files[file] = (folder / file).stat().st_size
    manifest = {
        **(
            {"version": 1, "step": 10, "world": ranks}
            if first_version
            else {"version": 2, "steps_done": 10, "world_size": ranks}
        ),
        "stage": "align",
        "seed": 0,
        "optimizer_steps": 10,
        "plan": "0" * 8,
        "model": {"path": str(base), "preset": None, "init_from_image": []},
        "files": files,
        "parameters": parameters,
        **({} if recorded_spans is None else {"spans": recorded_spans}),
    }
    if not first_version:
        manifest["sha256"] = {file: sha256_file(folder / file) for file in files}
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    recipe = {"train": {"precision": precision}, "data": {"spans": spans or {}}}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    (run / "metrics.jsonl").write_text(
        '{"step": 9, "loss": 2.5, "sample_digest": "abc"}\n{"step": 10, "loss": 9}\n'
    )
    return folder
