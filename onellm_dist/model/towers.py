"""The encoder's weights and sizes from open_clip's and timm's vision transformers (seen with open_clip 3.3, timm 1.0.31)."""

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


def name_from_open_clip(name: str) -> str | None:
    """Our name of a parameter of open_clip's `visual` (name without that prefix), or None where it is none of its."""
    for pattern, replacement in _OPEN_CLIP_NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def from_open_clip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's `visual.state_dict()` as our encoder's state dict (the tensors themselves are the same).

    Raises:
        OneLLMError: a key belongs to no CLIP visual transformer (a ResNet, an attention pool, a SigLIP).
    """
    named = {key: name_from_open_clip(key) for key in state}
    unknown = [key for key, name in named.items() if name is None]
    if unknown:
        raise OneLLMError(
            f"not a CLIP visual transformer: unknown keys {', '.join(unknown)}",
            "OneLLM's encoder has no place for them.",
            "give the `visual` state dict of a plain open_clip ViT such as ViT-L-14.",
        )
    return {str(name): state[key] for key, name in named.items()}


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
"""Parts behind the tokens, which OneLLM does not use."""
_ACTS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


def name_from_timm(name: str) -> str | None:
    """Our name of a parameter of timm's VisionTransformer, or None where it is none of its."""
    for pattern, replacement in _TIMM_NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def encoder_of(tower: Any) -> tuple[OneLLMVisionConfig, dict[str, torch.Tensor]]:
    """Config and weights (fp32 or whatever they are) of a vision tower, as `Encoder` takes them.

    Args:
        tower: timm's VisionTransformer; open_clip's, an open_clip model, or open_clip's wrapper of a timm one.

    Raises:
        OneLLMError: it computes something that `Encoder` does not (another architecture, norms of queries and keys, ...).
    """
    tower = getattr(tower, "visual", tower)  # a whole open_clip model
    mean, std = (
        getattr(tower, "image_mean", None),
        getattr(tower, "image_std", None),
    )  # open_clip sets them on its towers
    tower = getattr(tower, "trunk", tower)
    kind = f"{type(tower).__module__}.{type(tower).__qualname__}"
    if kind == "open_clip.transformer.VisionTransformer":
        config, state = _open_clip_config(tower), _without_pooling(tower)
        weights = from_open_clip(
            {
                key: value
                for key, value in state.items()
                if config.post_norm or not key.startswith("ln_post.")
            }
        )
    elif kind == "timm.models.vision_transformer.VisionTransformer":
        told = getattr(tower, "pretrained_cfg", None) or {}
        mean, std = mean or told.get("mean"), std or told.get("std")
        config, weights = _timm_config(tower), _timm_weights(tower)
    else:
        raise OneLLMError(
            f"{kind} is no vision transformer that the encoder can run",
            "its blocks must run over packed tokens, with the same numbers.",
            "take a plain ViT of open_clip or timm (vit_large_patch14_dinov2, ViT-L-14, vit_base_patch16_siglip_224, ...).",
        )
    if mean and std and not _close(mean, CLIP_MEAN, std, CLIP_STD):
        config.image_mean, config.image_std = list(mean), list(std)
    return config, weights


def _open_clip_config(tower: Any) -> OneLLMVisionConfig:
    block = tower.transformer.resblocks[0]
    _plain(
        type(block).__name__ == "ResidualAttentionBlock",
        "its blocks are not open_clip's plain ones",
    )
    _plain(tower.conv1.kernel_size[0] == tower.conv1.kernel_size[1], "its patches are not square")
    return OneLLMVisionConfig(
        width=tower.conv1.out_channels,
        layers=len(tower.transformer.resblocks),
        heads=block.attn.num_heads,
        mlp_ratio=block.mlp.c_fc.out_features / tower.conv1.out_channels,
        patch_size=tower.conv1.kernel_size[0],
        image_size=tower.image_size[0],
        act=_act(block.mlp.gelu),
        output_dim=tower.proj.shape[1] if tower.attn_pool is None else None,
        pre_norm=isinstance(tower.ln_pre, torch.nn.LayerNorm),
        post_norm=tower.attn_pool is None and not tower.final_ln_after_pool,
        layer_scale=not isinstance(block.ls_1, torch.nn.Identity),
        norm_eps=block.ln_1.eps,
    )


def _timm_config(tower: Any) -> OneLLMVisionConfig:
    block = tower.blocks[0]
    _plain(
        type(block).__name__ == "Block" and type(block.attn).__name__ == "Attention",
        "its blocks are not timm's plain ones",
    )
    glu = type(block.mlp).__name__ == "GluMlp" and not block.mlp.gate_last
    plain = type(block.mlp).__name__ == "Mlp"
    _plain(glu or plain, f"its MLP is timm's {type(block.mlp).__name__}")
    extra = [
        n
        for n in ("q_norm", "k_norm", "norm")
        if not isinstance(getattr(block.attn, n, torch.nn.Identity()), torch.nn.Identity)
    ]
    extra += [
        n
        for n in ("norm",)
        if not isinstance(getattr(block.mlp, n, torch.nn.Identity()), torch.nn.Identity)
    ]
    _plain(
        not extra and getattr(block.attn, "gate", None) is None,
        f"its blocks have {', '.join(extra) or 'a gate'} besides",
    )
    patch, (height, width) = tower.patch_embed.proj, tower.patch_embed.img_size
    _plain(
        patch.kernel_size[0] == patch.kernel_size[1] and height == width,
        "its pictures or patches are not square",
    )
    return OneLLMVisionConfig(
        width=tower.embed_dim,
        layers=len(tower.blocks),
        heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / tower.embed_dim,
        patch_size=patch.kernel_size[0],
        image_size=height,
        act=_act(block.mlp.act),
        output_dim=None,
        class_token=tower.cls_token is not None,
        registers=0 if tower.reg_token is None else tower.reg_token.shape[1],
        positions="none"
        if tower.pos_embed is None
        else "patches"
        if tower.no_embed_class
        else "all",
        patch_bias=patch.bias is not None,
        qkv_bias=block.attn.qkv.bias is not None,
        pre_norm=not isinstance(tower.norm_pre, torch.nn.Identity),
        post_norm=not isinstance(tower.norm, torch.nn.Identity),
        layer_scale=not isinstance(block.ls1, torch.nn.Identity),
        mlp="glu" if glu else "plain",
        norm_eps=block.norm1.eps,
    )


def _timm_weights(tower: Any) -> dict[str, torch.Tensor]:
    state = _without_pooling(tower)
    named = {key: name_from_timm(key) for key in state}
    unknown = [key for key, name in named.items() if name is None]
    _plain(not unknown, f"it has weights that the encoder does not know: {', '.join(unknown[:8])}")
    shapes = {
        "class_token.weight": (-1,),
        "positions.weight": (-1, tower.embed_dim),
        "registers.weight": (-1, tower.embed_dim),
    }
    return {
        str(name): state[key].reshape(shapes.get(str(name), state[key].shape))
        for key, name in named.items()
    }


def _without_pooling(tower: Any) -> dict[str, torch.Tensor]:
    pooled = (
        getattr(tower, "attn_pool", None) is not None
    )  # open_clip's projection then belongs to the pooled tokens
    state = tower.state_dict()
    return {
        key: value
        for key, value in state.items()
        if not key.startswith(_POOLING) and not (pooled and key == "proj")
    }


def _act(module: Any) -> str:
    name = type(module).__name__
    if name == "GELU" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    _plain(name in _ACTS, f"its activation is {name}")
    return _ACTS[name]


def _plain(condition: bool, what: str) -> None:
    if not condition:
        raise OneLLMError(
            f"the vision transformer cannot be the encoder: {what}",
            "its numbers would be others.",
            "take a plain ViT of timm or open_clip.",
        )


def _close(
    mean: Sequence[float],
    other_mean: Sequence[float],
    std: Sequence[float],
    other_std: Sequence[float],
) -> bool:
    pairs = (*zip(mean, other_mean, strict=True), *zip(std, other_std, strict=True))
    return all(abs(a - b) < 1e-6 for a, b in pairs)
