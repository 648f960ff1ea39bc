"""open_clip's checkpoints and OpenAI's TorchScript files: the visual transformer, in and out."""

from __future__ import annotations

import json
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
from onellm_dist.convert.names.clip import require_clip, to_open_clip_name
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
from onellm_dist.model.towers import from_open_clip_name

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
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UsageError(
                f"no {CONFIG} in {path}",
                "sizes and activation are in it.",
                "give open_clip's folder, or a weights file.",
            )
        stated = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        stated = stated.get("model_cfg", stated)
        (state, files), scripted = read_folder(path, STEMS), False
    else:
        (state, scripted), files = _read_state(path), (path,)
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    act = _get_act(stated, options, path, scripted)
    config = _build_config(state, stated, options, path, act)
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
    if options.act is not None:
        return options.act
    if scripted or stated.get("quick_gelu"):
        return "quick_gelu"
    return "gelu" if stated else None


def _build_config(
    state: Tensors,
    stated: dict[str, Any],
    options: ConversionOptions,
    path: Path,
    act: str | None,
) -> OneLLMVisionConfig:
    """Our config for open_clip's tensors and its config."""
    for key in _SIZE_KEYS:
        if key not in state:
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
    sizes = {
        "width": (vision.get("width", width), width),
        "patch_size": (vision.get("patch_size", patch), patch),
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
    blocks = (key for key in state if key.startswith("visual.transformer.resblocks."))
    return OneLLMVisionConfig(
        width=width,
        layers=len({key.split(".")[3] for key in blocks}),
        heads=options.encoder_heads or max(1, width // int(vision.get("head_width", HEAD_WIDTH))),
        mlp_ratio=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        patch_size=patch,
        image_size=patch * round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5),
        act=act,
        output_dim=state["visual.proj"].shape[1],
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
        (folder / CONFIG).write_text(
            json.dumps({"model_cfg": content}, indent=2) + "\n", encoding="utf-8"
        )

    return OutputPlan((TensorFile("open_clip_model.safetensors", tensors),), finish)
