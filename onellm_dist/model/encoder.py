"""The shared encoder: a vision transformer over packed tokens (paper, section 3.2).

It is CLIP's by default; its weights come from `weights/towers.py` or a checkpoint. Every parameter
is read in the forward of the module that owns it, so that ZeRO-3 gathers it there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from onellm_dist.modalities.transforms.crops import CLIP_MEAN, CLIP_STD
from onellm_dist.model.attention import packed_attention
from onellm_dist.model.configuration import OneLLMVisionConfig
from onellm_dist.model.kernels.activations import compute_quick_gelu, compute_silu_product
from onellm_dist.model.sequence_lengths import SequenceLengths, to_device_tensor

LAYER_NORM_EPS = 1e-5
"""Epsilon of the LayerNorms around the encoder (CLIP's own)."""


class PatchEmbedding(nn.Conv2d):
    """Pictures to tokens, row by row.

    Args:
        config: config of the encoder.
    """

    def __init__(self, config: OneLLMVisionConfig) -> None:
        super().__init__(
            3,
            config.width,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=config.patch_bias,
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, image, image] -> [n, patches, D]; pixels are cast to the weights' dtype."""
        return super().forward(images.to(self.weight.dtype)).flatten(2).transpose(1, 2)


class PrefixTokens(nn.Module):
    """Learned tokens put before those of every modality: the class token [D], or registers [R, D].

    Args:
        shape: shape of the parameter.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, L, D] -> [n, R + L, D]."""
        n, _, width = tokens.shape
        own = self.weight.reshape(-1, width)
        return torch.cat([own.expand(n, len(own), width).to(tokens.dtype), tokens], dim=1)


class Positions(nn.Module):
    """Learned positions of sequences of one fixed length.

    Args:
        length: L.
        width: D.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, L, D] -> [n, L, D]."""
        return tokens + self.weight


class LayerScale(nn.Module):
    """One learned factor per channel (CaiT, DINOv2).

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        return x * self.weight


class VisualProjection(nn.Module):
    """CLIP's final projection [D, output_dim].

    OneLLM never uses it; it is kept so that checkpoints round-trip.

    Args:
        width: D.
        output_dim: columns.
    """

    def __init__(self, width: int, output_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, output_dim), requires_grad=False)


class EncoderAttention(nn.Module):
    """Bidirectional self-attention within each sequence of a pack.

    Args:
        width: D.
        heads: H.
        bias: whether queries, keys and values have biases.
    """

    attend = staticmethod(packed_attention)
    """Computes attention (`compiled_blocks` puts an untraced one in its place)."""

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, seq_lengths: SequenceLengths) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        tokens, width = x.shape
        # q, k and v: [T, H, D/H] each.
        q, k, v = self.qkv(x).reshape(tokens, 3, self.heads, width // self.heads).unbind(1)
        attended = self.attend(q, k, v, seq_lengths).reshape(tokens, width)
        return cast(torch.Tensor, self.out(attended))


class EncoderMLP(nn.Module):
    """Linear, activation (gated in form `glu`), linear.

    Args:
        width: D.
        hidden: hidden channels.
        act: activation, as in `OneLLMVisionConfig`.
        form: `plain` or `glu`.
    """

    fused = False
    """Whether activations are single kernels (`model_kernels.set_kernels`)."""

    def __init__(self, width: int, hidden: int, act: str, form: str = "plain") -> None:
        super().__init__()
        self.act = act
        self.gated = form == "glu"
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden // 2 if self.gated else hidden, width)

    @property
    def form(self) -> str | None:
        """The fused form that its activation has; None: torch's own is one kernel already."""
        if self.act == "quick_gelu":
            return "quick_gelu"
        return "swiglu" if self.act == "silu" and self.gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        x = self.up(x)
        if self.gated:
            x, other = x.chunk(2, dim=-1)
            if self.act == "silu":
                product = compute_silu_product(x, other, fused=self.fused)
                return cast(torch.Tensor, self.down(product))
            return cast(torch.Tensor, self.down(self._activate(x) * other))
        return cast(torch.Tensor, self.down(self._activate(x)))

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        if self.act == "quick_gelu":
            return compute_quick_gelu(x, fused=self.fused)
        if self.act == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.act == "gelu_tanh" else "none")


class EncoderBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block.

    Args:
        config: config of the encoder.
    """

    def __init__(self, config: OneLLMVisionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = EncoderAttention(config.width, config.heads, bias=config.qkv_bias)
        self.ls_1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = EncoderMLP(config.width, config.mlp_width, config.act, config.mlp)
        self.ls_2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(self, x: torch.Tensor, seq_lengths: SequenceLengths) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        x = x + self.ls_1(self.attn(self.ln_1(x), seq_lengths))
        return cast(torch.Tensor, x + self.ls_2(self.mlp(self.ln_2(x))))


class Encoder(nn.Module):
    """The vision transformer.

    `encode_images` takes pictures; `prepend_prefix` and `forward` take the tokens of any other
    modality.

    Args:
        config: config of the encoder.
    """

    class_token: Any
    """PrefixTokens, or Identity in an encoder without a class token."""
    positions: Any
    """Positions, or Identity in an encoder without learned positions."""

    def __init__(self, config: OneLLMVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = PatchEmbedding(config)
        self.class_token = PrefixTokens(config.width) if config.class_token else nn.Identity()
        self.registers = (
            PrefixTokens(config.registers, config.width) if config.registers else nn.Identity()
        )
        length = {"all": config.prefix + config.patches, "patches": config.patches}.get(
            config.positions
        )
        self.positions = Positions(length, config.width) if length is not None else nn.Identity()
        self.ln_pre = (
            nn.LayerNorm(config.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        )
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.layers))
        self.ln_post = (
            nn.LayerNorm(config.width, eps=config.norm_eps) if config.post_norm else nn.Identity()
        )
        if config.output_dim is not None:
            self.proj = VisualProjection(config.width, config.output_dim)

    def forward(self, x: torch.Tensor, seq_lengths: SequenceLengths) -> torch.Tensor:
        """Tokens with positions [T, D] -> [T, D].

        It runs ln_pre, the blocks and ln_post on every token; class tokens stay in place.
        """
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x, seq_lengths)
        return cast(torch.Tensor, self.ln_post(x))

    def prepend_prefix(self, tokens: torch.Tensor) -> torch.Tensor:
        """Class token and registers before the tokens: [n, L, D] -> [n, P + L, D]."""
        return cast(torch.Tensor, self.class_token(self.registers(tokens)))

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Run everything on images that are normalised as the encoder was trained.

        [n, 3, image, image] -> [n, P + patches, D].
        """
        x = self.patches(images)
        x = (
            self.prepend_prefix(self.positions(x))
            if self.config.positions == "patches"
            else self.positions(self.prepend_prefix(x))
        )
        n, length, width = x.shape
        seq_lengths = SequenceLengths.from_lengths((length,) * n, device=x.device)
        encoded: torch.Tensor = self(x.reshape(n * length, width), seq_lengths)
        return encoded.reshape(n, length, width)

    def normalise_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames as the modalities give them, normalised and sized as this encoder was trained.

        Modalities give CLIP's normalisation and 224 pixels:
        [n, 3, 224, 224] -> [n, 3, image, image].
        """
        config = self.config
        if config.image_mean is not None and config.image_std is not None:
            statistics = to_device_tensor(
                [CLIP_MEAN, CLIP_STD, config.image_mean, config.image_std],
                frames.device,
                frames.dtype,
            )
            mean, std, own_mean, own_std = statistics[:, :, None, None]
            frames = frames * (std / own_std) + (mean - own_mean) / own_std
        side = config.image_size
        if frames.shape[-1] == side:
            return frames
        if not len(frames):  # resizing refuses an empty batch
            return frames.new_zeros((0, frames.shape[1], side, side))
        return F.interpolate(frames.float(), (side, side), mode="bicubic", antialias=True)
