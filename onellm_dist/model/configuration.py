"""The model's configuration, as a transformers config: `AutoConfig.from_pretrained` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.model.folder_code.files import CONFIG_MAP, has_all_modalities
from onellm_dist.model.saving import KeepsSums

ROUTERS = ("soft", "constant", "sparse")
EXPERT_INITS = ("separate", "copied")
SPAN_POSITIONS = ("none", "fixed", "learned")


class OneLLMVisionConfig(PretrainedConfig):
    """The encoder: a vision transformer.

    The defaults are CLIP ViT-L/14 of OpenAI. DINOv2, SigLIP and other towers of timm and open_clip
    differ in the arguments behind `output_dim`.

    Args:
        width: D, channels of a token.
        layers: blocks of the transformer.
        heads: H, attention heads.
        mlp_ratio: hidden channels of a block's MLP, divided by `width`.
        patch_size: side of a patch in pixels.
        image_size: side of a picture in pixels. Positions are not interpolated: pictures of another
            size are resized before the encoder.
        act: `quick_gelu` (x sigmoid(1.702 x), OpenAI's weights), `gelu`, `gelu_tanh` or `silu`.
        output_dim: columns of CLIP's final projection, which OneLLM keeps and never uses; None for
            an encoder without one.
        class_token: whether a class token stands before the patches (or the tokens of another
            modality).
        registers: number of registers before the patches.
        positions: `all` (prefix and patches have positions), `patches` (added before the prefix is
            put there) or `none`.
        patch_bias: whether the patch embedding has a bias.
        qkv_bias: whether queries, keys and values have biases.
        pre_norm: whether a LayerNorm stands before the blocks.
        post_norm: whether a LayerNorm stands behind the blocks.
        layer_scale: whether each branch of a block is scaled by a learned vector.
        mlp: `plain`, or `glu` (the first map's output is halved; act(first half) x second half).
        norm_eps: epsilon of the LayerNorms.
        image_mean: mean of the pixels that the encoder was trained on, by channel; None: CLIP's, as
            the modalities give them.
        image_std: standard deviation of these pixels, by channel; None: CLIP's.
        kwargs: as of transformers' PretrainedConfig.

    Raises:
        UsageError: an unknown form, or heads that do not divide the width.
    """

    model_type = "onellm_vision"

    def __init__(
        self,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        patch_size: int = 14,
        image_size: int = 224,
        act: str = "quick_gelu",
        output_dim: int | None = 768,
        class_token: bool = True,
        registers: int = 0,
        positions: str = "all",
        patch_bias: bool = False,
        qkv_bias: bool = True,
        pre_norm: bool = True,
        post_norm: bool = True,
        layer_scale: bool = False,
        mlp: str = "plain",
        norm_eps: float = 1e-5,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.width = width
        self.layers = layers
        self.heads = heads
        self.mlp_ratio = mlp_ratio
        self.patch_size = patch_size
        self.image_size = image_size
        self.act = act
        self.output_dim = output_dim
        self.class_token = class_token
        self.registers = registers
        self.positions = positions
        self.patch_bias = patch_bias
        self.qkv_bias = qkv_bias
        self.pre_norm = pre_norm
        self.post_norm = post_norm
        self.layer_scale = layer_scale
        self.mlp = mlp
        self.norm_eps = norm_eps
        self.image_mean = None if image_mean is None else list(image_mean)
        self.image_std = None if image_std is None else list(image_std)
        _check_choice("vision.act", act, ("quick_gelu", "gelu", "gelu_tanh", "silu"))
        _check_choice("vision.positions", positions, ("all", "patches", "none"))
        _check_choice("vision.mlp", mlp, ("plain", "glu"))
        _check_divides("vision.heads", heads, "vision.width", width)
        super().__init__(**kwargs)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def patches(self) -> int:
        """Patch tokens of an image (256 at ViT-L/14)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix(self) -> int:
        """P, tokens before the patches: the class token and the registers."""
        return int(self.class_token) + self.registers

    @property
    def clip(self) -> bool:
        """Whether the encoder has CLIP's own form, which checkpoint formats of CLIP can hold."""
        plain = OneLLMVisionConfig()
        own = (
            "class_token",
            "registers",
            "positions",
            "patch_bias",
            "qkv_bias",
            "pre_norm",
            "post_norm",
            "layer_scale",
            "mlp",
            "norm_eps",
        )
        return self.output_dim is not None and all(
            getattr(self, name) == getattr(plain, name) for name in own
        )


class OneLLMUPMConfig(PretrainedConfig):
    """The universal projection module (paper, section 3.2). Its width is the encoder's.

    Args:
        experts: E, projection experts.
        blocks: transformer blocks of an expert.
        heads: attention heads of a block.
        ffn: hidden channels of a block's SwiGLU.
        router: `soft` (sigmoid, normalised over experts), `constant` (1 / E) or `sparse` (the
            largest soft weight alone).
        router_hidden: hidden channels of the router's MLP.
        init: `separate` (each expert has its own random weights, as in the reference's code) or
            `copied` (all start as the first one, as the paper says of experts grown from one).
        kwargs: as of transformers' PretrainedConfig.

    Raises:
        UsageError: an unknown router or initialisation.
    """

    model_type = "onellm_upm"

    def __init__(
        self,
        experts: int = 3,
        blocks: int = 8,
        heads: int = 16,
        ffn: int = 2816,
        router: str = "soft",
        router_hidden: int = 4096,
        init: str = "separate",
        **kwargs: Any,
    ) -> None:
        self.experts = experts
        self.blocks = blocks
        self.heads = heads
        self.ffn = ffn
        self.router = router
        self.router_hidden = router_hidden
        self.init = init
        _check_choice("upm.router", router, ROUTERS)
        _check_choice("upm.init", init, EXPERT_INITS)
        super().__init__(**kwargs)


class OneLLMConfig(KeepsSums, PretrainedConfig):
    """A complete OneLLM: encoder, UPM, any causal LM of transformers, and the modalities it reads.

    Args:
        vision: config of the encoder, or a mapping of its arguments.
        upm: config of the UPM, or a mapping of its arguments.
        text_config: config of the LLM, or a mapping with its `model_type`.
        modalities: names of the modalities; default: all that the package has. They are kept in the
            order of the modalities' own `order`.
        span_positions: how the LLM knows the spans of one medium from each other: `none`,
            `fixed` or `learned` (`spans/positions.py`).
        kwargs: as of transformers' PretrainedConfig.

    Raises:
        UsageError: an unknown modality, LLM or form, or sizes that do not fit.
    """

    model_type = "onellm"
    code_map = CONFIG_MAP
    # transformers declares a plain dict, not a ClassVar.
    sub_configs = {  # noqa: RUF012
        "text_config": AutoConfig,
        "vision": OneLLMVisionConfig,
        "upm": OneLLMUPMConfig,
    }

    def __init__(
        self,
        vision: OneLLMVisionConfig | dict[str, Any] | None = None,
        upm: OneLLMUPMConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        modalities: Sequence[str] | None = None,
        span_positions: str = "none",
        **kwargs: Any,
    ) -> None:
        self.span_positions = span_positions
        _check_choice("span_positions", span_positions, SPAN_POSITIONS)
        self.vision = (
            vision
            if isinstance(vision, OneLLMVisionConfig)
            else OneLLMVisionConfig(**_to_arguments(vision))
        )
        self.upm = (
            upm if isinstance(upm, OneLLMUPMConfig) else OneLLMUPMConfig(**_to_arguments(upm))
        )
        self.text_config = _build_text_config(text_config)
        names = list(all_modalities()) if modalities is None else list(modalities)
        self.modalities = sorted(dict.fromkeys(names), key=lambda name: get_modality(name).order)
        _check_divides("upm.heads", self.upm.heads, "vision.width", self.vision.width)
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    def can_give_code(self) -> bool:
        """Whether all modalities are of this package: the code of others is not given away."""
        return has_all_modalities(self.modalities)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """The LLM's config: transformers' generation reads vocabulary and cache sizes from it."""
        return self.text_config

    @property
    def visual_modalities(self) -> list[str]:
        """Names of the modalities that the encoder's own patch embedding reads."""
        return [name for name in self.modalities if get_modality(name).visual]

    @property
    def tokenizer_modalities(self) -> list[str]:
        """Names of the modalities with a trainable tokenizer."""
        return [name for name in self.modalities if not get_modality(name).visual]


def _to_arguments(value: Any) -> dict[str, Any]:
    arguments = dict(value or {})
    arguments.pop("model_type", None)
    return arguments


def _build_text_config(value: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    arguments = dict(value or {"model_type": "llama"})
    kind = arguments.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise UsageError(
            f"text_config.model_type={kind!r} is unknown to this transformers",
            "the LLM cannot be built.",
            "name a causal LM it has, such as llama or qwen2.",
        )
    return CONFIG_MAPPING[kind](**arguments)


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(
            f"{key}={value!r}", "the model has no such form.", f"use one of: {', '.join(choices)}."
        )


def _check_divides(key: str, value: int, total_key: str, total: int) -> None:
    if total % value:
        raise UsageError(
            f"{key}={value} does not divide {total_key}={total}",
            "every head has the same number of channels.",
            "choose a number that divides it.",
        )
