"""Weights and sizes of the encoder from vision transformers of open_clip and timm.

Checked with open_clip 3.3 and timm 1.0.31.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.modalities.transforms.crops import CLIP_MEAN, CLIP_STD
from onellm_dist.model.configuration import OneLLMVisionConfig

_OPEN_CLIP_NAMES = (
    (r"class_embedding", "class_token.weight"),
    (r"positional_embedding", "positions.weight"),
    (r"proj", "proj.weight"),
    (r"conv1\.weight", "patches.weight"),
    (r"(ln_pre|ln_post)\.(weight|bias)", r"\1.\2"),
    (r"transformer\.resblocks\.(\d+)\.(ln_1|ln_2)\.(weight|bias)", r"blocks.\1.\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.out.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)", r"blocks.\1.mlp.up.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)", r"blocks.\1.mlp.down.\2"),
    (r"transformer\.resblocks\.(\d+)\.ls_(1|2)\.gamma", r"blocks.\1.ls_\2.weight"),
)
_TIMM_NAMES = (
    (r"cls_token", "class_token.weight"),
    (r"reg_token", "registers.weight"),
    (r"pos_embed", "positions.weight"),
    (r"patch_embed\.proj\.(weight|bias)", r"patches.\1"),
    (r"norm_pre\.(weight|bias)", r"ln_pre.\1"),
    (r"norm\.(weight|bias)", r"ln_post.\1"),
    (r"blocks\.(\d+)\.norm(1|2)\.(weight|bias)", r"blocks.\1.ln_\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"blocks.\1.attn.out.\2"),
    (r"blocks\.(\d+)\.ls(1|2)\.gamma", r"blocks.\1.ls_\2.weight"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", r"blocks.\1.mlp.up.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)", r"blocks.\1.mlp.down.\2"),
)
_POOLING = ("head.", "head_drop.", "fc_norm.", "attn_pool.", "attn_pool_contrastive.")
"""Parts that pool the tokens, which OneLLM does not use."""
_ACTS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


def from_open_clip_name(name: str) -> str | None:
    """The encoder's name of a parameter of open_clip's `visual`; None: it has no such parameter.

    Args:
        name: open_clip's name, without `visual.`.
    """
    return _rename(name, _OPEN_CLIP_NAMES)


def from_timm_name(name: str) -> str | None:
    """The encoder's name of a parameter of timm's VisionTransformer; None: it has none."""
    return _rename(name, _TIMM_NAMES)


def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str | None:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def from_open_clip_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's `visual.state_dict()` as the encoder's state dict; the tensors are the same.

    Raises:
        OneLLMError: a key belongs to no CLIP visual transformer (a ResNet, an attention pool, a
            SigLIP).
    """
    named = {key: from_open_clip_name(key) for key in state}
    unknown = [key for key, name in named.items() if name is None]
    if unknown:
        raise OneLLMError(
            f"not a CLIP visual transformer: unknown keys {', '.join(unknown)}",
            "OneLLM's encoder has no place for them.",
            "give the `visual` state dict of a plain open_clip ViT such as ViT-L-14.",
        )
    return {str(name): state[key] for key, name in named.items()}


def convert_tower(tower: Any) -> tuple[OneLLMVisionConfig, dict[str, torch.Tensor]]:
    """Config and weights of a vision tower, as `Encoder` takes them; weights keep their dtype.

    Args:
        tower: timm's VisionTransformer; open_clip's, an open_clip model, or open_clip's wrapper of
            a timm tower.

    Raises:
        OneLLMError: the tower computes something that `Encoder` does not (another architecture,
            norms of queries and keys, ...).
    """
    tower = getattr(tower, "visual", tower)  # a complete open_clip model
    # open_clip sets these on its towers.
    mean, std = getattr(tower, "image_mean", None), getattr(tower, "image_std", None)
    tower = getattr(tower, "trunk", tower)
    kind = f"{type(tower).__module__}.{type(tower).__qualname__}"
    if kind == "open_clip.transformer.VisionTransformer":
        config = _read_open_clip_config(tower)
        weights = _read_open_clip_weights(tower, config)
    elif kind == "timm.models.vision_transformer.VisionTransformer":
        pretrained = getattr(tower, "pretrained_cfg", None) or {}
        mean, std = mean or pretrained.get("mean"), std or pretrained.get("std")
        config, weights = _read_timm_config(tower), _read_timm_weights(tower)
    else:
        raise OneLLMError(
            f"{kind} is not a vision transformer that the encoder can run",
            "its blocks must run over packed tokens, with the same numbers.",
            "use a plain ViT of open_clip or timm (vit_large_patch14_dinov2, ViT-L-14, "
            "vit_base_patch16_siglip_224, ...).",
        )
    if mean and std and not _is_close([*mean, *std], [*CLIP_MEAN, *CLIP_STD]):
        config.image_mean = list(mean)
        config.image_std = list(std)
    return config, weights


def _read_open_clip_config(tower: Any) -> OneLLMVisionConfig:
    block = tower.transformer.resblocks[0]
    _require(
        type(block).__name__ == "ResidualAttentionBlock",
        "its blocks are not open_clip's plain ones",
    )
    _require(tower.conv1.kernel_size[0] == tower.conv1.kernel_size[1], "its patches are not square")
    return OneLLMVisionConfig(
        width=tower.conv1.out_channels,
        layers=len(tower.transformer.resblocks),
        heads=block.attn.num_heads,
        mlp_ratio=block.mlp.c_fc.out_features / tower.conv1.out_channels,
        patch_size=tower.conv1.kernel_size[0],
        image_size=tower.image_size[0],
        act=_read_act(block.mlp.gelu),
        output_dim=tower.proj.shape[1] if tower.attn_pool is None else None,
        pre_norm=isinstance(tower.ln_pre, torch.nn.LayerNorm),
        post_norm=tower.attn_pool is None and not tower.final_ln_after_pool,
        layer_scale=not isinstance(block.ls_1, torch.nn.Identity),
        norm_eps=block.ln_1.eps,
    )


def _read_open_clip_weights(tower: Any, config: OneLLMVisionConfig) -> dict[str, torch.Tensor]:
    state = _read_state_without_pooling(tower)
    if not config.post_norm:
        state = {key: value for key, value in state.items() if not key.startswith("ln_post.")}
    return from_open_clip_state(state)


def _read_timm_config(tower: Any) -> OneLLMVisionConfig:
    block = tower.blocks[0]
    glu = _check_timm_block(block)
    patch, (height, width) = tower.patch_embed.proj, tower.patch_embed.img_size
    _require(
        patch.kernel_size[0] == patch.kernel_size[1] and height == width,
        "its pictures or patches are not square",
    )
    positions = "patches" if tower.no_embed_class else "all"
    return OneLLMVisionConfig(
        width=tower.embed_dim,
        layers=len(tower.blocks),
        heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / tower.embed_dim,
        patch_size=patch.kernel_size[0],
        image_size=height,
        act=_read_act(block.mlp.act),
        output_dim=None,
        class_token=tower.cls_token is not None,
        registers=0 if tower.reg_token is None else tower.reg_token.shape[1],
        positions="none" if tower.pos_embed is None else positions,
        patch_bias=patch.bias is not None,
        qkv_bias=block.attn.qkv.bias is not None,
        pre_norm=not isinstance(tower.norm_pre, torch.nn.Identity),
        post_norm=not isinstance(tower.norm, torch.nn.Identity),
        layer_scale=not isinstance(block.ls1, torch.nn.Identity),
        mlp="glu" if glu else "plain",
        norm_eps=block.norm1.eps,
    )


def _check_timm_block(block: Any) -> bool:
    """Check that the encoder can run a block of timm. Returns whether its MLP is gated."""
    _require(
        type(block).__name__ == "Block" and type(block.attn).__name__ == "Attention",
        "its blocks are not timm's plain ones",
    )
    glu = type(block.mlp).__name__ == "GluMlp" and not block.mlp.gate_last
    plain = type(block.mlp).__name__ == "Mlp"
    _require(glu or plain, f"its MLP is timm's {type(block.mlp).__name__}")
    parts = [(block.attn, name) for name in ("q_norm", "k_norm", "norm")] + [(block.mlp, "norm")]
    identity = torch.nn.Identity()
    extra = [
        name
        for part, name in parts
        if not isinstance(getattr(part, name, identity), torch.nn.Identity)
    ]
    _require(
        not extra and getattr(block.attn, "gate", None) is None,
        f"its attention or MLP has more: {', '.join(extra) or 'gate'}",
    )
    return glu


def _read_timm_weights(tower: Any) -> dict[str, torch.Tensor]:
    state = _read_state_without_pooling(tower)
    named = {key: from_timm_name(key) for key in state}
    unknown = [key for key, name in named.items() if name is None]
    _require(
        not unknown, f"it has weights that the encoder does not know: {', '.join(unknown[:8])}"
    )
    shapes = {
        "class_token.weight": (-1,),
        "positions.weight": (-1, tower.embed_dim),
        "registers.weight": (-1, tower.embed_dim),
    }
    return {
        str(name): state[key].reshape(shapes.get(str(name), state[key].shape))
        for key, name in named.items()
    }


def _read_state_without_pooling(tower: Any) -> dict[str, torch.Tensor]:
    # With an attention pool, open_clip's projection belongs to the pooled tokens.
    pooled = getattr(tower, "attn_pool", None) is not None
    state = tower.state_dict()
    return {
        key: value
        for key, value in state.items()
        if not key.startswith(_POOLING) and not (pooled and key == "proj")
    }


def _read_act(module: Any) -> str:
    name = type(module).__name__
    if name == "GELU" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    _require(name in _ACTS, f"its activation is {name}")
    return _ACTS[name]


def _require(condition: bool, obstacle: str) -> None:
    if not condition:
        raise OneLLMError(
            f"the vision transformer cannot be the encoder: {obstacle}",
            "the encoder would compute other numbers.",
            "use a plain ViT of timm or open_clip.",
        )


def _is_close(values: Sequence[float], others: Sequence[float]) -> bool:
    return all(abs(a - b) < 1e-6 for a, b in zip(values, others, strict=True))
