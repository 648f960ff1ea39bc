"""CLIP's visual transformer by the names of open_clip and of transformers, and as ours."""

from __future__ import annotations

import re

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import Tensors
from onellm_dist.convert.tensors.lazy import LazyTensor, concatenated
from onellm_dist.model.configuration import OneLLMVisionConfig

_TO_OPEN_CLIP = (
    (r"class_token\.weight", "class_embedding"),
    (r"positions\.weight", "positional_embedding"),
    (r"proj\.weight", "proj"),
    (r"patches\.weight", "conv1.weight"),
    (r"(ln_pre|ln_post)\.(weight|bias)", r"\1.\2"),
    (r"blocks\.(\d+)\.(ln_1|ln_2)\.(weight|bias)", r"transformer.resblocks.\1.\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"transformer.resblocks.\1.attn.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.out\.(weight|bias)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.up\.(weight|bias)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"blocks\.(\d+)\.mlp\.down\.(weight|bias)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
)
_TO_HF = (
    (r"class_token\.weight", "vision_model.embeddings.class_embedding"),
    (r"positions\.weight", "vision_model.embeddings.position_embedding.weight"),
    (r"proj\.weight", "visual_projection.weight"),
    (r"patches\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),  # transformers' own spelling
    (r"ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"blocks\.(\d+)\.ln_(1|2)\.(weight|bias)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (
        r"blocks\.(\d+)\.attn\.out\.(weight|bias)",
        r"vision_model.encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (r"blocks\.(\d+)\.mlp\.up\.(weight|bias)", r"vision_model.encoder.layers.\1.mlp.fc1.\2"),
    (r"blocks\.(\d+)\.mlp\.down\.(weight|bias)", r"vision_model.encoder.layers.\1.mlp.fc2.\2"),
)
_HF_QKV = "vision_model.encoder.layers.{}.self_attn.{}_proj.{}"
_OUR_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")


def only_clip(config: OneLLMVisionConfig, target: str) -> None:
    """Refuse to write an encoder that is not of CLIP's form (DINOv2, SigLIP, ...) in a format of CLIP.

    Raises:
        UsageError: it is not.
    """
    if not config.clip:
        raise UsageError(
            f"the encoder is no CLIP (class token {config.class_token}, registers {config.registers}, layer scale {config.layer_scale})",
            f"the format {target} has no place for it.",
            "write it as onellm.",
        )


def open_clip_name(name: str) -> str:
    """open_clip's name (without `visual.`) of our encoder's parameter.

    Raises:
        KeyError: it has none.
    """
    for pattern, replacement in _TO_OPEN_CLIP:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    raise KeyError(name)


def _hf_names(name: str) -> tuple[str, ...]:
    """The keys in transformers of our encoder's parameter: three for the joint projection of queries, keys and values."""
    qkv = _OUR_QKV.fullmatch(name)
    if qkv:
        return tuple(_HF_QKV.format(qkv[1], part, qkv[2]) for part in "qkv")
    return next(
        (match.expand(r),) for pattern, r in _TO_HF if (match := re.fullmatch(pattern, name))
    )


def from_hf(
    state: Tensors, names: list[str]
) -> tuple[dict[str, tuple[str | None, LazyTensor]], set[str]]:
    """Transformers' state as (its key -> (our name, tensor)) for our parameters `names`, and all of its keys that were used."""
    given: dict[str, tuple[str | None, LazyTensor]] = {}
    used: set[str] = set()
    for name in names:
        keys = _hf_names(name)
        if not all(key in state for key in keys):
            continue
        used |= set(keys)
        tensor = concatenated([state[key] for key in keys]) if len(keys) > 1 else state[keys[0]]
        given[keys[0]] = (name, _transposed(tensor) if name == "proj.weight" else tensor)
    return given, used


def to_hf(tensors: Tensors) -> Tensors:
    """Our encoder's tensors under transformers' names."""
    state: Tensors = {}
    for name, tensor in tensors.items():
        keys = _hf_names(name)
        if len(keys) > 1:
            third = tensor.shape[0] // 3
            state |= {key: tensor.rows(i * third, (i + 1) * third) for i, key in enumerate(keys)}
        else:
            state[keys[0]] = _transposed(tensor) if name == "proj.weight" else tensor
    return state


def _transposed(tensor: LazyTensor) -> LazyTensor:
    return tensor.mapped(lambda t: t.t(), shape=tuple(reversed(tensor.shape)))
