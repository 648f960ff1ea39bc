"""The shared encoder: CLIP's visual transformer over packed tokens, with weights from open_clip (paper, section 3.2).

Every parameter is read in the forward of the module that owns it, so that ZeRO-3 gathers it there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from onellm_dist.errors import OneLLMError
from onellm_dist.model.attention import Segments, packed_attention
from onellm_dist.model.configuration import OneLLMVisionConfig

LAYER_NORM_EPS = 1e-5


class PatchEmbedding(nn.Conv2d):
    """CLIP's `conv1`: [n, 3, image, image] -> [n, patches, width], row by row."""

    def __init__(self, config: OneLLMVisionConfig) -> None:
        super().__init__(3, config.width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, image, image] -> [n, patches, width]; pixels are cast to the weights' dtype."""
        return super().forward(images.to(self.weight.dtype)).flatten(2).transpose(1, 2)


class ClassToken(nn.Module):
    """CLIP's class embedding, put before the tokens of every modality."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, L, D] -> [n, L + 1, D]."""
        n, _, width = tokens.shape
        return torch.cat([self.weight.expand(n, 1, width).to(tokens.dtype), tokens], dim=1)


class Positions(nn.Module):
    """Learned positions of a sequence of one fixed length."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, length, D] -> [n, length, D]."""
        return tokens + self.weight


class VisualProjection(nn.Module):
    """CLIP's final projection [D, output_dim]: kept so that checkpoints round-trip, never used by OneLLM."""

    def __init__(self, width: int, output_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, output_dim), requires_grad=False)


class EncoderAttention(nn.Module):
    """Bidirectional self-attention within each segment of a pack."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(tokens, 3, self.heads, width // self.heads).unbind(1)  # [T, H, D / H] each
        return self.out(packed_attention(q, k, v, segments).reshape(tokens, width))


class EncoderMLP(nn.Module):
    """Linear, (quick) GELU, linear."""

    def __init__(self, width: int, hidden: int, act: str) -> None:
        super().__init__()
        self.act = act
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        x = self.up(x)
        return self.down(x * torch.sigmoid(1.702 * x) if self.act == "quick_gelu" else F.gelu(x))


class EncoderBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block of CLIP."""

    def __init__(self, config: OneLLMVisionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attn = EncoderAttention(config.width, config.heads)
        self.ln_2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.mlp = EncoderMLP(config.width, config.mlp_width, config.act)

    def forward(self, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        x = x + self.attn(self.ln_1(x), segments)
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """CLIP's visual transformer. `patches`, `class_token` and `positions` make its input; forward is the transformer."""

    def __init__(self, config: OneLLMVisionConfig) -> None:
        super().__init__()
        self.patches = PatchEmbedding(config)
        self.class_token = ClassToken(config.width)
        self.positions = Positions(config.patches + 1, config.width)
        self.ln_pre = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.proj = VisualProjection(config.width, config.output_dim)

    def forward(self, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Tokens with positions [T, D] -> [T, D]: ln_pre, the blocks, ln_post on every token (class tokens stay)."""
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x, segments)
        return self.ln_post(x)

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """A batch of images through everything: [n, 3, image, image] -> [n, patches + 1, D]."""
        x = self.positions(self.class_token(self.patches(images)))
        n, length, width = x.shape
        return self(x.reshape(n * length, width), Segments.of((length,) * n, device=x.device)).reshape(n, length, width)


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
