"""A small copy of an LLM's config that keeps everything that decides what its tokens may see.

Widths are divided and the number of heads with them, so that heads keep their width and every key
that depends on it. Layers are cut behind the first that completes the set of different ones.
Windows, chunks and the limits of RoPE scaling become shorter than the probes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from onellm_dist.model.llm.positions import POSITION_KEYS

Values = dict[str, Any]

WINDOW = 8
"""Reduced sliding windows and chunks, in tokens."""
ORIGINAL_POSITIONS = 10
"""Reduced length up to which RoPE is not scaled."""
POSITIONS = 64
"""Reduced number of positions."""
VOCABULARY = 128

_HEADS = re.compile(
    r"(\w+_)?(num|n)_(\w+_)?(heads?|head_groups|query_groups)(_\w+)?|(de|en)coder_attention_heads"
    r"|num_attention_groups|n_groups|mamba_n_groups|mamba_ngroups"
)
_WIDTHS = re.compile(
    r"(\w+_)?hidden_size|n_embd|d_model|dim|word_embed_proj_dim|lru_width|embedding_(size|dim)"
    r"|mamba_d_ssm"
)
_INNER = re.compile(
    r"n_inner|d_ff|(\w+_)?(intermediate|ffn_hidden)_size|(\w+_)?ffn_dim|(\w+_)?intermediate_dim"
    r"|dim_ff|inner_hidden_size|intermediate_size_mlp|ffn_size|dff"
)
_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_blocks",
)
_VOCABULARIES = re.compile(r"vocab_size(_per_layer_input)?")
_EXPERTS = re.compile(r"(moe_|n_|num_)*(routed_|local_)?experts|moe_num_experts")
_WINDOWS = re.compile(
    r"(\w+_)?sliding_window(_size)?|(\w+_)?window_size|attention_chunk_size|index_topk|floor_scale"
)
_ORIGINAL = "original_max_position_embeddings"
_TOKENS = re.compile(r"\w+_token_id")
_IGNORED = re.compile(
    r"_name_or_path|architectures|dtype|torch_dtype|transformers_version|id2label"
    r"|label2id|use_cache|initializer_range|_attn_implementation\w*|problem_type|auto_map"
    r"|(output|return)_\w+|quantization_config|_experts_implementation\w*|tokenizer_class"
)


def reduce_values(values: Values, *, width: int = 0, depth: int | None = None) -> Values:
    """The reduced values of a config.

    Args:
        values: `config.to_dict()`.
        width: which of `find_ratios` divides widths and heads; the last one changes nothing.
        depth: layers to keep; default: all.
    """
    ratios = find_ratios(values)
    ratio = ratios[min(width, len(ratios) - 1)]
    full = get_depth(values)
    reduced: Values = {}
    for key, value in values.items():
        if _IGNORED.fullmatch(key):
            continue
        reduced[key] = _reduce_value(key, value, values, ratio, width, depth)
        if depth is not None and full is not None:
            if key in _DEPTHS:
                reduced[key] = min(full, depth)
            elif isinstance(value, list) and len(value) == full:
                reduced[key] = reduced[key][:depth]
            elif key == "per_layer_config" and isinstance(value, dict):
                reduced[key] = {k: v for k, v in reduced[key].items() if int(k) < depth}
    if _is_dynamic(values):
        for key in set(POSITION_KEYS) & reduced.keys():
            reduced[key] = ORIGINAL_POSITIONS
    return reduced


def _reduce_value(
    key: str, value: Any, values: Values, ratio: int, width: int, depth: int | None
) -> Any:
    if isinstance(value, dict):
        if key.endswith("_config"):
            # Towers of a multimodal LLM are not part of what text sees.
            return reduce_values(value, width=width, depth=depth if key == "text_config" else 1)
        return {k: _reduce_value(k, v, values, 1, width, depth) for k, v in value.items()}
    if isinstance(value, list) and (key.endswith("_heads_per_layer") or _INNER.fullmatch(key)):
        name = key.removesuffix("_per_layer")
        return [_reduce_value(name, item, values, ratio, width, depth) for item in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _HEADS.fullmatch(key) or _WIDTHS.fullmatch(key):
        return _divide(value, ratio)
    if _INNER.fullmatch(key) and ratio > 1:
        return max(8, value // ratio // 8 * 8)
    if _TOKENS.fullmatch(key):
        return 0
    if _VOCABULARIES.fullmatch(key):
        return min(value, VOCABULARY)
    if _EXPERTS.fullmatch(key) and value > 16:
        groups = values.get("n_group") or 1
        return min(value, groups * -(-16 // groups))
    if _WINDOWS.fullmatch(key):
        return min(value, WINDOW)
    if key == _ORIGINAL:
        return min(value, ORIGINAL_POSITIONS)
    return min(value, POSITIONS) if key in POSITION_KEYS else value


def _divide(value: int, ratio: int) -> int:
    return value if value in (0, 1) else max(1, value // ratio)


def _is_dynamic(values: Values) -> bool:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    parts = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    return any("dynamic" in str(p.get("rope_type", p.get("type"))) for p in parts)


def find_ratios(values: Values) -> list[int]:
    """Numbers by which all widths and numbers of heads can be divided, from the largest to 1.

    At least 64 channels remain. Of fewer heads than the number (key heads), one remains.
    """
    numbers = {k: v for k, v in values.items() if isinstance(v, int) and not isinstance(v, bool)}
    heads = [v for k, v in numbers.items() if _HEADS.fullmatch(k) and v > 1]
    widths = [v for k, v in numbers.items() if _WIDTHS.fullmatch(k) and v > 1]
    main = next((numbers[k] for k in ("hidden_size", "n_embd", "d_model") if k in numbers), 64)
    found = [
        ratio
        for ratio in range(main // 64, 1, -1)
        if all(v % ratio == 0 or ratio % v == 0 for v in heads)
        and all(v % (2 * ratio) == 0 for v in widths)
    ]
    # Several heads where that is possible; each try at least halves the ratio.
    several = [d for d in found if max(heads, default=1) >= 2 * d] or found
    chosen: list[int] = []
    for ratio in several:
        if not chosen or ratio <= chosen[-1] // 2:
            chosen.append(ratio)
    return [*chosen[:3], 1]


def get_depth(values: Values) -> int | None:
    """Number of layers that a config, or the text part of one, names."""
    own = next((values[k] for k in _DEPTHS if isinstance(values.get(k), int)), None)
    text = values.get("text_config")
    return get_depth(text) if own is None and isinstance(text, dict) else own


def find_depth(values: Values, build: Callable[[Values], Any]) -> int | None:
    """Number of layers after which no new kind of layer comes; None: the layers cannot be compared.

    Args:
        values: a config.
        build: builds the LLM of a config.
    """
    full = get_depth(values)
    if full is None or full <= 2:
        return None
    with torch.device("meta"):
        model = build(values)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == full]
    if not stacks:
        return None
    seen: dict[Any, int] = {}
    for stack in stacks:
        for i, layer in enumerate(stack):
            key = (type(layer).__name__, tuple(_describe(layer)))
            seen[key] = min(seen.get(key, i), i)
    depth = max(2, 1 + max(seen.values()))
    return depth if depth < full else None


def _describe(layer: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What makes a layer different from others: classes, shapes, and its plain attributes."""
    for name, module in layer.named_modules():
        plain = sorted(
            (k, str(v))
            for k, v in vars(module).items()
            if isinstance(v, bool | str | int | None)
            and not re.search(r"idx|index|_id$|^training$|number|^_", k)
        )
        shapes = [(k, tuple(p.shape)) for k, p in module.named_parameters(recurse=False)]
        yield name, type(module).__name__, tuple(plain), tuple(shapes)
