"""CLIP's visual transformer: our names as open_clip's and as transformers', and back."""

from __future__ import annotations

import re

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors, concatenate
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


def require_clip(config: OneLLMVisionConfig, target: str) -> None:
    """Check that an encoder has CLIP's form, before it is written in a format of CLIP.

    Args:
        config: config of the encoder.
        target: name of the format.

    Raises:
        UsageError: it has another form (DINOv2, SigLIP, ...).
    """
    if not config.clip:
        raise UsageError(
            f"the encoder is not a CLIP (class token {config.class_token}, "
            f"registers {config.registers}, layer scale {config.layer_scale})",
            f"the format {target} has no place for it.",
            "write it as onellm.",
        )


def to_open_clip_name(name: str) -> str:
    """open_clip's name, without `visual.`, of a parameter of our encoder.

    Raises:
        KeyError: open_clip has no such parameter.
    """
    for pattern, replacement in _TO_OPEN_CLIP:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise KeyError(name)


def _to_hf_names(name: str) -> tuple[str, ...]:
    """Keys in transformers of a parameter of our encoder: three for the joint qkv projection."""
    qkv = _OUR_QKV.fullmatch(name)
    if qkv:
        return tuple(_HF_QKV.format(qkv[1], part, qkv[2]) for part in "qkv")
    return next(
        (match.expand(r),) for pattern, r in _TO_HF if (match := re.fullmatch(pattern, name))
    )


def from_hf(
    state: Tensors, names: list[str]
) -> tuple[dict[str, tuple[str | None, LazyTensor]], set[str]]:
    """Match transformers' state with our parameters.

    Args:
        state: transformers' state dict.
        names: our parameters that are wanted.

    Returns:
        (transformers' key -> (our name, tensor), all of transformers' keys that were used).
    """
    given: dict[str, tuple[str | None, LazyTensor]] = {}
    used: set[str] = set()
    for name in names:
        keys = _to_hf_names(name)
        if not all(key in state for key in keys):
            continue
        used |= set(keys)
        tensor = concatenate([state[key] for key in keys]) if len(keys) > 1 else state[keys[0]]
        given[keys[0]] = (name, _transpose(tensor) if name == "proj.weight" else tensor)
    return given, used


def to_hf(tensors: Tensors) -> Tensors:
    """The tensors of our encoder under transformers' names."""
    state: Tensors = {}
    for name, tensor in tensors.items():
        keys = _to_hf_names(name)
        if len(keys) > 1:
            third = tensor.shape[0] // 3
            state |= {key: tensor.rows(i * third, (i + 1) * third) for i, key in enumerate(keys)}
        else:
            state[keys[0]] = _transpose(tensor) if name == "proj.weight" else tensor
    return state


def _transpose(tensor: LazyTensor) -> LazyTensor:
    return tensor.map(lambda t: t.t(), shape=tuple(reversed(tensor.shape)))
