"""LLaMA in Meta's layout and in transformers': names, rotary permutation, heads."""

from __future__ import annotations

import re
from typing import Any

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
