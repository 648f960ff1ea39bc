"""Names of parameters in the reference (csuhan/OneLLM at 8587a47, keys `llma.*`), and ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from onellm_dist.convert.names.clip import to_open_clip_name
from onellm_dist.convert.names.llama import BLOCK, TOP
from onellm_dist.model.weights.towers import from_open_clip_name

MODALITIES = {
    "image": "image",
    "video": "video",
    "audio": "audio",
    "point": "point",
    "rgbd": "depth",
    "rgbn": "normal",
    "fmri": "fmri",
    "imu": "imu",
}
"""The reference's name of each modality -> ours."""
_UPM_BLOCK = {
    "attention.wq": "attention.q",
    "attention.wk": "attention.k",
    "attention.wv": "attention.v",
    "attention.wo": "attention.out",
    "feed_forward.w1": "feed_forward.gate",
    "feed_forward.w3": "feed_forward.up",
    "feed_forward.w2": "feed_forward.down",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_TOKENIZER = {"audio": "conv", "point.conv1": "conv", "fmri": "linear", "imu": "conv"}
_PROJECTION = ("linear", "norm")

_Match = re.Match[str]
_NAMES = "|".join(MODALITIES)
_RULES: tuple[tuple[str, Callable[[_Match], str | None]], ...] = (
    (r"(tok_embeddings|norm|output)\.weight", lambda m: f"llm.{TOP[m[1]]}.weight"),
    (
        rf"layers\.(\d+)\.({'|'.join(BLOCK)})\.weight",
        lambda m: f"llm.model.layers.{m[1]}.{BLOCK[m[2]]}.weight",
    ),
    (
        rf"resample_layers\.(\d+)\.(\d+)\.({'|'.join(_UPM_BLOCK)})\.weight",
        lambda m: f"upm.experts.{m[1]}.blocks.{m[2]}.{_UPM_BLOCK[m[3]]}.weight",
    ),
    (
        r"clip\.visual\.(.+)",
        lambda m: f"encoder.{name}" if (name := from_open_clip_name(m[1])) else None,
    ),
    (
        rf"conv1\.({'|'.join(_TOKENIZER)})\.(weight|bias)",
        lambda m: f"tokenizers.{m[1].split('.')[0]}.embed.{_TOKENIZER[m[1]]}.{m[2]}",
    ),
    (
        r"positional_embedding\.(audio|point|fmri|imu)",
        lambda m: f"tokenizers.{m[1]}.positions.weight",
    ),
    (rf"resample_tokens\.({_NAMES})", lambda m: f"projectors.{MODALITIES[m[1]]}.queries.weight"),
    (
        rf"span_positions\.({_NAMES})",
        lambda m: f"projectors.{MODALITIES[m[1]]}.span_positions.weight",
    ),
    (rf"(start|end)_tag\.({_NAMES})", lambda m: f"projectors.{MODALITIES[m[2]]}.{m[1]}_tag.weight"),
    (
        rf"clip_proj1\.({_NAMES})\.([01])\.(weight|bias)",
        lambda m: f"projectors.{MODALITIES[m[1]]}.in_proj.{_PROJECTION[int(m[2])]}.{m[3]}",
    ),
    (
        rf"clip_proj2\.({_NAMES})\.([01])\.(weight|bias)",
        lambda m: f"projectors.{MODALITIES[m[1]]}.out_proj.{_PROJECTION[int(m[2])]}.{m[3]}",
    ),
    (
        rf"routers\.({_NAMES})\.(fc[12])\.(weight|bias)",
        lambda m: f"projectors.{MODALITIES[m[1]]}.router.{m[2]}.{m[3]}",
    ),
)


def from_reference_name(key: str) -> str | None:
    """Our name of a parameter of the reference; None: we have no such parameter.

    The reference's `resample_layers.<expert>.<block>` are our experts; its `rgbd` and `rgbn` are
    our depth and normal.

    Args:
        key: the reference's key, without `llma.`.
    """
    for pattern, rename in _RULES:
        if match := re.fullmatch(pattern, key):
            return rename(match)
    return None


_THEIRS = {ours: theirs for theirs, ours in MODALITIES.items()}
_RULES_BACK: tuple[tuple[str, Callable[[_Match], str | None]], ...] = (
    (
        r"llm\.(model\.embed_tokens|model\.norm|lm_head)\.weight",
        lambda m: f"{_invert(TOP)[m[1]]}.weight",
    ),
    (
        r"llm\.model\.layers\.(\d+)\.(.+)\.weight",
        lambda m: f"layers.{m[1]}.{_invert(BLOCK)[m[2]]}.weight",
    ),
    (
        r"upm\.experts\.(\d+)\.blocks\.(\d+)\.(.+)\.weight",
        lambda m: f"resample_layers.{m[1]}.{m[2]}.{_invert(_UPM_BLOCK)[m[3]]}.weight",
    ),
    (r"encoder\.(.+)", lambda m: f"clip.visual.{to_open_clip_name(m[1])}"),
    (
        r"tokenizers\.(\w+)\.embed\.\w+\.(weight|bias)",
        lambda m: f"conv1.{'point.conv1' if m[1] == 'point' else m[1]}.{m[2]}",
    ),
    (r"tokenizers\.(\w+)\.positions\.weight", lambda m: f"positional_embedding.{m[1]}"),
    (r"projectors\.(\w+)\.queries\.weight", lambda m: f"resample_tokens.{_THEIRS[m[1]]}"),
    (
        r"projectors\.(\w+)\.span_positions\.weight",
        lambda m: f"span_positions.{_THEIRS[m[1]]}",
    ),
    (r"projectors\.(\w+)\.(start|end)_tag\.weight", lambda m: f"{m[2]}_tag.{_THEIRS[m[1]]}"),
    (
        r"projectors\.(\w+)\.(in|out)_proj\.(linear|norm)\.(weight|bias)",
        lambda m: (
            f"clip_proj{1 if m[2] == 'in' else 2}.{_THEIRS[m[1]]}.{_PROJECTION.index(m[3])}.{m[4]}"
        ),
    ),
    (
        r"projectors\.(\w+)\.router\.(fc[12])\.(weight|bias)",
        lambda m: f"routers.{_THEIRS[m[1]]}.{m[2]}.{m[3]}",
    ),
)


def to_reference_name(name: str) -> str:
    """The reference's key, without `llma.`, of our parameter.

    Raises:
        KeyError: the reference has no such part.
    """
    for pattern, rename in _RULES_BACK:
        match = re.fullmatch(pattern, name)
        if match and (key := rename(match)):
            return key
    raise KeyError(name)


def _invert(names: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}
