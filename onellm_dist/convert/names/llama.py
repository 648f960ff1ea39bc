"""LLaMA in Meta's layout and in transformers': names, rotary permutation, params.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
"""Keys of the rotary frequencies [head width / 2] in Meta's checkpoints; models compute them."""


def from_meta_name(key: str) -> str | None:
    """Name in transformers of Meta's key; None: it has no such parameter."""
    match = re.fullmatch(rf"({'|'.join(TOP)})\.weight", key)
    if match:
        return f"{TOP[match[1]]}.weight"
    match = re.fullmatch(rf"layers\.(\d+)\.({'|'.join(BLOCK)})\.weight", key)
    return f"model.layers.{match[1]}.{BLOCK[match[2]]}.weight" if match else None


def to_meta_name(name: str) -> str | None:
    """Meta's key of transformers' name; None: Meta has no such parameter."""
    match = re.fullmatch(rf"({'|'.join(_META_TOP)})\.weight", name)
    if match:
        return f"{_META_TOP[match[1]]}.weight"
    match = re.fullmatch(rf"model\.layers\.(\d+)\.({'|'.join(_META_BLOCK)})\.weight", name)
    return f"layers.{match[1]}.{_META_BLOCK[match[2]]}.weight" if match else None


def get_rotary_heads(name: str, config: Any) -> int | None:
    """Heads of a weight whose rows the rotary embedding permutes; None for all others.

    Args:
        name: transformers' name of the weight.
        config: transformers' config of the LLM.
    """
    if name.endswith("self_attn.q_proj.weight"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if name.endswith("self_attn.k_proj.weight") else None


def to_halves(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Rows of wq or wk from Meta's order to transformers': [rows, columns] -> [rows, columns].

    Meta rotates neighbouring channels (2i, 2i + 1), transformers channels (i, i + half).

    Args:
        tensor: the weight.
        heads: its heads.
    """
    rows, columns = tensor.shape
    return tensor.map(
        lambda w: (
            w.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        )
    )


def to_pairs(tensor: LazyTensor, heads: int) -> LazyTensor:
    """The inverse of `to_halves`."""
    rows, columns = tensor.shape
    return tensor.map(
        lambda w: (
            w.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        )
    )


def check_heads(label: str, heads: int, width: int, table: LazyTensor | None = None) -> None:
    """Check that a number of heads is possible.

    Args:
        label: the option that gives the number, for the error.
        heads: number of heads.
        width: channels of all heads.
        table: the checkpoint's rotary frequencies [head width / 2], if it has them.

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
            f"{label}={heads} means heads of {width // heads} channels, the checkpoint's rotary "
            f"table is for {2 * table.numel}",
            "attention would mix the wrong channels.",
            do,
        )


def build_llama_config(
    params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: object
) -> LlamaConfig:
    """The transformers config for Meta's params.json; every size is checked against the tensors.

    Args:
        params: content of params.json.
        shapes: Meta's key -> shape.
        source: the checkpoint, for the error.

    Raises:
        UsageError: a size contradicts a shape.
    """
    vocabulary, width = shapes["tok_embeddings.weight"]
    layers = len({key.split(".")[1] for key in shapes if key.startswith("layers.")})
    heads = int(params.get("n_heads") or width // 128)
    kv_heads = int(params.get("n_kv_heads") or heads)
    check_heads("n_heads", heads, width)
    sizes = {
        "dim": (params.get("dim", width), width),
        "n_layers": (params.get("n_layers", layers), layers),
        "n_heads * head width (rows of wq)": (width, shapes["layers.0.attention.wq.weight"][0]),
        "n_kv_heads * head width (rows of wk)": (
            kv_heads * (width // heads),
            shapes["layers.0.attention.wk.weight"][0],
        ),
    }
    if params.get("vocab_size", -1) > 0:
        sizes["vocab_size"] = (params["vocab_size"], vocabulary)
    wrong = [
        f"{name} is {stated}, the tensors have {actual}"
        for name, (stated, actual) in sizes.items()
        if stated != actual
    ]
    if wrong:
        raise UsageError(
            f"{source}: params.json contradicts the weights: {'; '.join(wrong)}",
            "heads would be wrong.",
            "give the params.json of these weights.",
        )
    large_vocabulary = vocabulary > 100_000  # LLaMA 3 and later
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
        rope_parameters=_build_rope(params),
        tie_word_embeddings=False,
        bos_token_id=128000 if large_vocabulary else 1,
        eos_token_id=128001 if large_vocabulary else 2,
    )


def _build_rope(params: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` of transformers for Meta's params.json."""
    theta = float(params.get("rope_theta", 10000.0))
    if not params.get("use_scaled_rope"):
        return {"rope_type": "default", "rope_theta": theta}
    # LLaMA 3.1 and later. Meta's code has these numbers; the small models of 3.2 have factor 32.
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(params.get("rope_scaling_factor", 8.0)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def build_params(config: Any) -> dict[str, Any]:
    """Meta's params.json for a LLaMA config of transformers.

    Raises:
        UsageError: the model has something that Meta's code cannot run.
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
            "keep it in transformers' format (hf).",
        )
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        **_build_ffn_rule(config.hidden_size, config.intermediate_size),
    }
    if rope.get("rope_theta", 10000.0) != 10000.0:  # LLaMA 2's code does not know the key
        params["rope_theta"] = float(rope["rope_theta"])
    if kind == "llama3":
        params["use_scaled_rope"] = True
        if rope.get("factor", 8.0) != 8.0:
            params["rope_scaling_factor"] = float(rope["factor"])
    return params


def _build_ffn_rule(width: int, hidden: int) -> dict[str, Any]:
    """The params from which Meta's code computes the FFN's width.

    It computes int(multiplier * int(8 / 3 * width)), rounded up to a multiple.
    """
    base = int(2 * (4 * width) / 3)
    if -(-base // 256) * 256 == hidden:
        return {"multiple_of": 256}
    return (
        {"multiple_of": hidden}
        if hidden >= base
        else {"multiple_of": 1, "ffn_dim_multiplier": (hidden + 0.5) / base}
    )
