"""open_clip's checkpoints and OpenAI's TorchScript files: the visual transformer, in and out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import (
    ConversionOptions,
    OpenedCheckpoint,
    OutputPlan,
    fit_tensors,
    get_parameter_shapes,
)
from onellm_dist.convert.folder_kinds import read_json
from onellm_dist.convert.names.clip import require_clip, to_open_clip_name
from onellm_dist.convert.pixels import CLIP_MEAN, CLIP_STD, choose_pixels, refuse_other_act
from onellm_dist.convert.sidecar import choose_heads
from onellm_dist.convert.tensors.archive import make_read_error
from onellm_dist.convert.tensors.lazy import Tensors
from onellm_dist.convert.tensors.pickled import (
    get_state_dict,
    get_torchscript_state,
    read_pickled,
)
from onellm_dist.convert.tensors.safetensors_files import read_folder, read_safetensors
from onellm_dist.convert.tensors.writers import TensorFile
from onellm_dist.model.configuration import OneLLMVisionConfig
from onellm_dist.model.encoder import Encoder
from onellm_dist.model.weights.towers import from_open_clip_name

NAME = "open-clip"
KIND = "encoder"
ORDER = 5
ABOUT = (
    "A CLIP of open_clip: a folder with open_clip_config.json, or a weights file (OpenAI's too)."
)
EXAMPLE = "ViT-L-14.pt"
DEFAULT_TARGET = "hf-clip"

CONFIG = "open_clip_config.json"
STEMS = ("open_clip_model", "open_clip_pytorch_model", "model")
"""Names that the weights files of a folder may begin with."""
_KNOWN = (
    "image_size",
    "layers",
    "width",
    "head_width",
    "patch_size",
    "mlp_ratio",
    "patch_dropout",
    "output_tokens",
    "pool_type",
    "global_average_pool",
)
"""Keys of vision_cfg that are read, or that concern training or the pooled output alone."""
HEAD_WIDTH = 64
"""Channels of a head, if the config does not state them."""
_SIZE_KEYS = (
    "visual.conv1.weight",
    "visual.positional_embedding",
    "visual.proj",
    "visual.transformer.resblocks.0.mlp.c_fc.weight",
)
"""Keys whose shapes are the encoder's sizes."""


def is_format(path: Path) -> bool:
    """Whether a path is a folder with open_clip's config, or a file with its keys."""
    if path.is_dir():
        return (path / CONFIG).is_file()
    try:
        return "visual.class_embedding" in _read_state(path)[0]
    except (UsageError, OSError):
        return False


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open a folder with open_clip_config.json, or a file.

    Args:
        path: the folder; or a .pt, .bin or .safetensors file, or an OpenAI's TorchScript archive.
        options: activation and heads.

    Raises:
        UsageError: not such a checkpoint, not a plain ViT, or the activation is unknown.
    """
    stated: dict[str, Any] = {}
    pixels: dict[str, Any] = {}
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UsageError(
                f"no {CONFIG} in {path}",
                "sizes and activation are in it.",
                "give open_clip's folder, or a weights file.",
            )
        content = read_json(path / CONFIG)
        found = (content or {}).get("model_cfg", content)
        if content is None or not isinstance(found, dict):
            raise UsageError(
                f"{path / CONFIG} is not a JSON object",
                "sizes and activation are in it.",
                "download it again.",
            )
        stated = found
        preprocess = content.get("preprocess_cfg")
        pixels = preprocess if isinstance(preprocess, dict) else {}
        (state, files), scripted = read_folder(path, STEMS), False
    else:
        (state, scripted), files = _read_state(path), (path,)
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    act = _get_act(stated, options, path, scripted)
    config = _build_config(state, stated, options, path, act)
    config.image_mean, config.image_std = choose_pixels(
        pixels.get("mean"), pixels.get("std"), path / CONFIG
    )
    visual = {key: t for key, t in state.items() if key.startswith("visual.")}
    text_keys = tuple(sorted(set(state) - set(visual)))  # the text tower is not a part of OneLLM
    tensors, ignored, problems = fit_tensors(
        {key: (from_open_clip_name(key.removeprefix("visual.")), t) for key, t in visual.items()},
        get_parameter_shapes(lambda: Encoder(config)),
    )
    root = path if path.is_dir() else path.parent
    return OpenedCheckpoint(
        NAME, KIND, config, tensors, files, root, (*ignored, *text_keys), problems
    )


def _read_state(path: Path) -> tuple[Tensors, bool]:
    """(state dict of a file, whether it is a TorchScript archive, as OpenAI's are)."""
    if not path.is_file():
        raise UsageError(f"no checkpoint {path}", "there is nothing to convert.", "check the path.")
    if path.suffix == ".safetensors":
        return read_safetensors(path), False
    tree = read_pickled(path, inert=("__torch__.",))
    scripted = get_torchscript_state(tree)
    return (scripted, True) if scripted else (get_state_dict(tree, path), False)


def _get_act(
    stated: dict[str, Any], options: ConversionOptions, path: Path, scripted: bool
) -> str | None:
    """The activation; None if neither the user nor the checkpoint states it."""
    if not scripted and not stated:
        return options.act
    own = "quick_gelu" if scripted or stated.get("quick_gelu") else "gelu"
    refuse_other_act(options, own, path)
    return own


def _build_config(
    state: Tensors,
    stated: dict[str, Any],
    options: ConversionOptions,
    path: Path,
    act: str | None,
) -> OneLLMVisionConfig:
    """Our config for open_clip's tensors and its config."""
    for key in _SIZE_KEYS:
        if key not in state or len(state[key].shape) != (4 if key.endswith("conv1.weight") else 2):
            raise make_read_error(path, f"it has no {key}: it is not a plain ViT of open_clip")
    if act is None:
        raise UsageError(
            f"{path} does not state its activation",
            "OpenAI's CLIP has quick_gelu, most others gelu; the wrong one gives wrong numbers "
            "everywhere and no error.",
            f"give --act quick_gelu or --act gelu, or a folder with {CONFIG}.",
        )
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vision = stated.get("vision_cfg", {})
    _refuse_unknown(vision, path)
    blocks = (key for key in state if key.startswith("visual.transformer.resblocks."))
    layers = len({key.split(".")[3] for key in blocks})
    hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    image_size = patch * math.isqrt(max(0, state["visual.positional_embedding"].shape[0] - 1))
    output_dim = state["visual.proj"].shape[1]
    sizes = {
        "width": (vision.get("width", width), width),
        "patch_size": (vision.get("patch_size", patch), patch),
        "layers": (vision.get("layers", layers), layers),
        "image_size": (vision.get("image_size", image_size), image_size),
        "embed_dim": (stated.get("embed_dim", output_dim), output_dim),
        "mlp_ratio": (vision.get("mlp_ratio", hidden / width), hidden / width),
    }
    if wrong := [
        f"{name} is {said}, the tensors have {actual}"
        for name, (said, actual) in sizes.items()
        if said != actual
    ]:
        raise UsageError(
            f"{path}: {CONFIG} contradicts the weights: {'; '.join(wrong)}",
            "heads would be wrong.",
            "give the config of these weights.",
        )
    head_width = vision.get("head_width")
    usual = max(1, width // HEAD_WIDTH)
    heads = choose_heads(
        "--encoder-heads", options.encoder_heads, head_width and width // head_width, path / CONFIG
    )
    return OneLLMVisionConfig(
        width=width,
        layers=layers,
        heads=heads or usual,
        mlp_ratio=hidden / width,
        patch_size=patch,
        image_size=image_size,
        act=act,
        output_dim=output_dim,
    )


def _refuse_unknown(vision: Any, path: Path) -> None:
    """Refuse a config that says more about the encoder than this program knows.

    Raises:
        UsageError: it does.
    """
    if not isinstance(vision, dict):
        raise UsageError(f"{path}: vision_cfg is not an object", "sizes are in it.", "restore it.")
    faults = [
        f"{key}={str(value)[:40]}"
        for key, value in vision.items()
        if key not in _KNOWN and value not in (None, False, 0, "learnable", {})
    ]
    sizes = ("width", "patch_size", "layers", "image_size", "head_width")
    faults += [
        f"{key}={str(vision[key])[:40]}"
        for key in sizes
        if key in vision and (type(vision[key]) is not int or vision[key] < 1)
    ]
    if faults:
        raise UsageError(
            f"{path / CONFIG}: vision_cfg has {', '.join(faults)}",
            "it may change what the encoder computes, and a plain ViT of CLIP has none of it.",
            "give it by name: --encoder open-clip:NAME@FILE.",
        )


def plan_output(opened: OpenedCheckpoint, options: ConversionOptions) -> OutputPlan:
    """`open_clip_model.safetensors` with the keys `visual.*`, and its config; no text tower.

    Raises:
        UsageError: the encoder has not CLIP's form.
    """
    config: OneLLMVisionConfig = opened.config
    require_clip(config, NAME)
    tensors = tuple(
        (f"visual.{to_open_clip_name(name)}", tensor) for name, tensor in opened.tensors.items()
    )

    def finish(folder: Path) -> None:
        vision = {
            "image_size": config.image_size,
            "layers": config.layers,
            "width": config.width,
            "patch_size": config.patch_size,
            "head_width": config.width // config.heads,
            "mlp_ratio": config.mlp_ratio,
        }
        content = {
            "embed_dim": config.output_dim,
            "vision_cfg": vision,
            "quick_gelu": config.act == "quick_gelu",
        }
        pixels = {
            "mean": config.image_mean or list(CLIP_MEAN),
            "std": config.image_std or list(CLIP_STD),
        }
        (folder / CONFIG).write_text(
            json.dumps({"model_cfg": content, "preprocess_cfg": pixels}, indent=2) + "\n",
            encoding="utf-8",
        )

    return OutputPlan((TensorFile("open_clip_model.safetensors", tensors),), finish)
