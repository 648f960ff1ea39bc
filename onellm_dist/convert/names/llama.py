"""LLaMA in Meta's layout and in transformers': names, the rotary permutation, params.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.tensors.lazy import LazyTensor

BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_META_BLOCK = {ours: theirs for theirs, ours in BLOCK.items()}
_META_TOP = {ours: theirs for theirs, ours in TOP.items()}
ROTARY_TABLE = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
"""Meta's checkpoints carry the rotary frequencies, [head width / 2]; models compute them."""

# Parts that are split over model-parallel ranks, and the dimension they are split in (fairscale's Column- and RowParallelLinear).
_SPLIT = (
    (re.compile(r".*\.(wq|wk|wv|w1|w3)\.weight|output\.weight"), 0),
    (re.compile(r".*\.(wo|w2)\.weight"), 1),
)


def name_from_meta(key: str) -> str | None:
    """Transformers' name of Meta's key, or None."""
    match = re.fullmatch(rf"({'|'.join(TOP)})\.weight", key)
    if match:
        return f"{TOP[match[1]]}.weight"
    match = re.fullmatch(rf"layers\.(\d+)\.({'|'.join(BLOCK)})\.weight", key)
    return f"model.layers.{match[1]}.{BLOCK[match[2]]}.weight" if match else None


def name_to_meta(name: str) -> str | None:
    """Meta's key of transformers' name, or None."""
    match = re.fullmatch(rf"({'|'.join(_META_TOP)})\.weight", name)
    if match:
        return f"{_META_TOP[match[1]]}.weight"
    match = re.fullmatch(rf"model\.layers\.(\d+)\.({'|'.join(_META_BLOCK)})\.weight", name)
    return f"layers.{match[1]}.{_META_BLOCK[match[2]]}.weight" if match else None


def rotary_heads(name: str, config: Any) -> int | None:
    """Heads of a weight whose rows the rotary embedding moves, named as in transformers; None for all others."""
    if name.endswith("self_attn.q_proj.weight"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if name.endswith("self_attn.k_proj.weight") else None


def to_halves(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Meta rotates neighbouring channels (2i, 2i + 1), transformers channels (i, i + half): rows of wq and wk move, [rows, columns]."""
    rows, columns = tensor.shape
    return tensor.mapped(
        lambda w: (
            w.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        )
    )


def to_pairs(tensor: LazyTensor, heads: int) -> LazyTensor:
    """The inverse of `to_halves`."""
    rows, columns = tensor.shape
    return tensor.mapped(
        lambda w: (
            w.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        )
    )


def split_dimension(key: str, parts: list[LazyTensor], width: int) -> int | None:
    """The dimension in which model-parallel files hold parts of `key`; None where each holds all of it.

    Embeddings are split by columns in LLaMA 1 and 2 (ParallelEmbedding), by words in LLaMA 3; `width` [columns] tells.
    """
    if key == "tok_embeddings.weight":
        return 0 if parts[0].shape[1] == width else 1
    return next((dim for pattern, dim in _SPLIT if pattern.fullmatch(key)), None)


def check_heads(label: str, heads: int, width: int, table: LazyTensor | None = None) -> None:
    """Refuse numbers of heads that cannot be.

    Args:
        table: the checkpoint's rotary frequencies [head width / 2], where it has them.

    Raises:
        UsageError: heads do not divide the width into even parts, or contradict the rotary table.
    """
    do = f"give the right number: {label}=N (7B models have width / 128 heads)."
    if heads < 1 or width % heads or (width // heads) % 2:
        raise UsageError(
            f"{label}={heads} does not split a width of {width} into even heads",
            "rotary channels come in pairs.",
            do,
        )
    if table is not None and table.numel != width // heads // 2:
        raise UsageError(
            f"{label}={heads} means heads of {width // heads} channels, the checkpoint's rotary table is for {2 * table.numel}",
            "attention would mix the wrong channels.",
            do,
        )


def config_from_params(
    params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: object
) -> LlamaConfig:
    """Transformers' config for Meta's params.json, every size checked against the tensors' shapes (Meta's keys).

    Raises:
        UsageError: a size contradicts a shape.
    """
    vocabulary, width = shapes["tok_embeddings.weight"]
    layers = len({key.split(".")[1] for key in shapes if key.startswith("layers.")})
    heads = int(params.get("n_heads") or width // 128)
    kv_heads = int(params.get("n_kv_heads") or heads)
    check_heads("n_heads", heads, width)
    told = {
        "dim": (params.get("dim", width), width),
        "n_layers": (params.get("n_layers", layers), layers),
        "n_heads * head width (rows of wq)": (width, shapes["layers.0.attention.wq.weight"][0]),
        "n_kv_heads * head width (rows of wk)": (
            kv_heads * (width // heads),
            shapes["layers.0.attention.wk.weight"][0],
        ),
    }
    if params.get("vocab_size", -1) > 0:
        told["vocab_size"] = (params["vocab_size"], vocabulary)
    wrong = [
        f"{name} is {says}, the tensors have {has}"
        for name, (says, has) in told.items()
        if says != has
    ]
    if wrong:
        raise UsageError(
            f"{source}: params.json contradicts the weights: {'; '.join(wrong)}",
            "heads would be wrong.",
            "give the right one.",
        )
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(params.get("rope_theta", 10000.0)),
    }
    if params.get(
        "use_scaled_rope"
    ):  # LLaMA 3.1 and later: Meta's code has these four numbers, 3.2's small models a factor of 32
        rope |= {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor", 8.0)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    large_vocabulary = vocabulary > 100_000
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["layers.0.feed_forward.w1.weight"][0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=int(
            params.get("max_seq_len") or (8192 if large_vocabulary else 4096)
        ),
        rms_norm_eps=float(params.get("norm_eps", 1e-5)),
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=128000 if large_vocabulary else 1,
        eos_token_id=128001 if large_vocabulary else 2,
    )


def params_from_config(config: Any) -> dict[str, Any]:
    """Meta's params.json for a LLaMA config of transformers.

    Raises:
        UsageError: the model has something that Meta's code does not know.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    head_width = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    faults = [
        fault
        for fault, there in (
            (f"model_type {config.model_type}", config.model_type != "llama"),
            ("biases in attention", getattr(config, "attention_bias", False)),
            ("biases in the MLP", getattr(config, "mlp_bias", False)),
            (f"rope_type {kind}", kind not in ("default", "llama3")),
            (
                f"heads of {head_width} channels",
                head_width * config.num_attention_heads != config.hidden_size,
            ),
        )
        if there
    ]
    if faults:
        raise UsageError(
            f"this LLM has {', '.join(faults)}",
            "Meta's LLaMA code cannot run it.",
            "keep it in transformers' layout (hf).",
        )
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        **_ffn_rule(config.hidden_size, config.intermediate_size),
    }
    if rope.get("rope_theta", 10000.0) != 10000.0:  # LLaMA 2's code does not know the key
        params["rope_theta"] = float(rope["rope_theta"])
    if kind == "llama3":
        params["use_scaled_rope"] = True
        if rope.get("factor", 8.0) != 8.0:
            params["rope_scaling_factor"] = float(rope["factor"])
    return params


def _ffn_rule(width: int, hidden: int) -> dict[str, Any]:
    """Meta's code computes the FFN's width: int(multiplier * int(8 / 3 * width)), rounded up to a multiple."""
    base = int(2 * (4 * width) / 3)
    if -(-base // 256) * 256 == hidden:
        return {"multiple_of": 256}
    return (
        {"multiple_of": hidden}
        if hidden >= base
        else {"multiple_of": 1, "ffn_dim_multiplier": (hidden + 0.5) / base}
    )


def same_across_ranks(key: str, parts: list[LazyTensor], files: list[Any]) -> LazyTensor:
    """A tensor that every model-parallel file holds whole; reading it compares them.

    Raises (on reading):
        UsageError: they differ.
    """

    def load() -> torch.Tensor:
        first = parts[0].read()
        for part, file in zip(parts[1:], files[1:], strict=True):
            if not torch.equal(part.read(), first):
                raise UsageError(
                    f"{key} differs between {files[0].name} and {file.name}",
                    "every model-parallel file should hold the same.",
                    "these files are not of one checkpoint: download them again.",
                )
        return first

    return LazyTensor(parts[0].shape, parts[0].dtype, load)
