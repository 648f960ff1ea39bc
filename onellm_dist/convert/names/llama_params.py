"""Meta's params.json: the config that it states, and the one that a config can be written as.

What Meta's code would compute differently is refused; nothing is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.names.llama import check_heads
from onellm_dist.convert.tensors.lazy import LazyTensor

SCALED_POSITIONS = 8192
"""Positions that LLaMA 3.1's scaling starts from, in Meta's code."""
_SMALL_SCALED = ((2048, 16), (3072, 28))
"""Width and layers of LLaMA 3.2's 1B and 3B: their scaling factor is 32, and no file states it."""
_INTEGERS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
_NUMBERS = ("norm_eps", "rope_theta", "rope_scaling_factor", "high_freq_factor")
_WITHOUT_EFFECT = ("multiple_of", "ffn_dim_multiplier", "max_batch_size", "model_parallel_size")
"""Keys whose effect is in the shapes already, or that concern running alone."""


def read_params(path: Path) -> dict[str, Any] | None:
    """The content of params.json; None if there is no such file.

    Raises:
        UsageError: it cannot be read, or has keys that would be lost.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}",
            "heads, RoPE and the norm's epsilon are in it.",
            "download it again.",
        ) from None
    return check_params(found, path)


def check_params(params: Any, source: object) -> dict[str, Any]:
    """Check that params.json has known keys with possible values.

    Args:
        params: content of the file.
        source: the file, for the error.

    Raises:
        UsageError: a key would be lost that changes numbers, or a value is impossible.
    """
    if not isinstance(params, dict):
        raise UsageError(
            f"{source} is not a JSON object", "heads and RoPE are in it.", "download it again."
        )
    known = (*_INTEGERS, *_NUMBERS, *_WITHOUT_EFFECT, "use_scaled_rope")
    faults = [
        f"{key}={str(value)[:60]} is not known"
        for key, value in params.items()
        if key not in known and value not in (None, False, 0)
    ]
    for key in _INTEGERS:
        value = params.get(key)
        if value is not None and (type(value) is not int or not -1 <= value < 1 << 32):
            faults.append(f"{key}={str(value)[:60]} is not a number of something")
    for key in _NUMBERS:
        value = params.get(key)
        if value is not None and (type(value) not in (int, float) or not 0 < value < 1e12):
            faults.append(f"{key}={str(value)[:60]} is not a positive number")
    if type(params.get("use_scaled_rope", False)) is not bool:
        faults.append("use_scaled_rope is not true or false")
    if faults:
        raise UsageError(
            f"{source}: {'; '.join(faults)}",
            "it may change what the model computes, and this program would not know how.",
            "give the params.json of a LLaMA 1, 2 or 3; other models in transformers' format (hf).",
        )
    return dict(params)


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
    heads = int(params.get("n_heads") or max(1, width // 128))
    kv_heads = int(params.get("n_kv_heads") or heads)
    check_heads("n_heads", heads, width)
    sizes = {
        "dim": (params.get("dim") or width, width),
        "n_layers": (params.get("n_layers") or layers, layers),
        "n_heads * head width (rows of wq)": (width, shapes["layers.0.attention.wq.weight"][0]),
        "n_kv_heads * head width (rows of wk)": (
            kv_heads * (width // heads),
            shapes["layers.0.attention.wk.weight"][0],
        ),
    }
    if (params.get("vocab_size") or -1) > 0:
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
        rms_norm_eps=float(params.get("norm_eps") or 1e-5),
        rope_parameters=_build_rope(params, (width, layers)),
        tie_word_embeddings=False,
        bos_token_id=128000 if large_vocabulary else 1,
        eos_token_id=128001 if large_vocabulary else 2,
    )


def _build_rope(params: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The `rope_parameters` of transformers for Meta's params.json."""
    theta = float(params.get("rope_theta") or 10000.0)
    if not params.get("use_scaled_rope"):
        return {"rope_type": "default", "rope_theta": theta}
    usual = 32.0 if size in _SMALL_SCALED else 8.0
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(params.get("rope_scaling_factor") or usual),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(params.get("high_freq_factor") or 4.0),
        "original_max_position_embeddings": SCALED_POSITIONS,
    }


def check_rotary_table(table: LazyTensor, theta: float, source: object) -> None:
    """Check a checkpoint's rotary frequencies against the RoPE base that is stated or assumed.

    Args:
        table: the frequencies before any scaling, [head width / 2].
        theta: the base.
        source: the checkpoint, for the error.

    Raises:
        UsageError: they are of another base.
    """
    count = table.numel
    stored = table.read().reshape(-1).double()
    own = 1.0 / theta ** (torch.arange(count, dtype=torch.float64) / count)
    if not torch.allclose(stored, own, rtol=0.02, atol=0):
        raise UsageError(
            f"{source}: its rotary table (rope.freqs) is not that of rope_theta={theta:g}",
            "positions would turn by other angles.",
            "give the params.json of these weights beside them, with its rope_theta.",
        )


def build_params(config: Any) -> dict[str, Any]:
    """Meta's params.json for a LLaMA config of transformers.

    Raises:
        UsageError: the model has something that Meta's code cannot run.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    faults = [fault for fault, there in _list_faults(config, rope, kind) if there]
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
        small = (config.hidden_size, config.num_hidden_layers) in _SMALL_SCALED
        if small or rope["factor"] != 8.0:
            params["rope_scaling_factor"] = float(rope["factor"])
    return params


def _list_faults(config: Any, rope: Mapping[str, Any], kind: str) -> list[tuple[str, bool]]:
    """(what Meta's code cannot run, whether the model has it)."""
    head_width = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    scaling = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": SCALED_POSITIONS,
    }
    other = [f"{key} {rope.get(key)}" for key, value in scaling.items() if rope.get(key) != value]
    parts = (rope.get("partial_rotary_factor"), getattr(config, "partial_rotary_factor", None))
    act = getattr(config, "hidden_act", "silu")
    return [
        (f"model_type {config.model_type}", config.model_type != "llama"),
        ("biases in attention", bool(getattr(config, "attention_bias", False))),
        ("biases in the MLP", bool(getattr(config, "mlp_bias", False))),
        (f"activation {act}", act not in ("silu", "swish")),
        (f"rope_type {kind}", kind not in ("default", "llama3")),
        (f"RoPE scaling with {', '.join(other)}", kind == "llama3" and bool(other)),
        ("rotary positions on a part of each head", any(part not in (None, 1.0) for part in parts)),
        (
            f"heads of {head_width} channels",
            head_width * config.num_attention_heads != config.hidden_size,
        ),
    ]


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
