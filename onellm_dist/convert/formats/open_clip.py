"""open_clip's checkpoints (and OpenAI's own TorchScript files): the visual transformer, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import Opened, Options, Plan, Tensors, fitted, parameter_shapes
from onellm_dist.convert.names.clip import only_clip, open_clip_name
from onellm_dist.convert.tensors.pickled import (
    read_pickled,
    state_of,
    torchscript_state,
    unreadable,
)
from onellm_dist.convert.tensors.safetensors_files import read_folder, read_safetensors
from onellm_dist.convert.tensors.writers import TensorFile
from onellm_dist.model.configuration import OneLLMVisionConfig
from onellm_dist.model.encoder import Encoder
from onellm_dist.model.towers import from_open_clip_name

NAME, KIND = "open-clip", "encoder"
CONFIG = "open_clip_config.json"
STEMS = ("open_clip_model", "open_clip_pytorch_model", "model")
HEAD_WIDTH = 64
"""Channels a head, where the config does not say."""


def recognise(path: Path) -> bool:
    """A folder with open_clip's config, or a file with its keys."""
    if path.is_dir():
        return (path / CONFIG).is_file()
    try:
        return "visual.class_embedding" in _state(path)[0]
    except (UsageError, OSError):
        return False


def open_checkpoint(path: Path, options: Options) -> Opened:
    """Open a folder with open_clip_config.json, or a file (.pt, .bin, .safetensors; also OpenAI's TorchScript archives).

    Raises:
        UsageError: it is none, no plain ViT, or nothing tells its activation.
    """
    about: dict[str, Any] = {}
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UsageError(
                f"no {CONFIG} in {path}",
                "sizes and activation are in it.",
                "give open_clip's folder, or a weights file.",
            )
        about = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        about = about.get("model_cfg", about)
        (state, files), scripted = read_folder(path, STEMS), False
    else:
        (state, scripted), files = _state(path), (path,)
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    config = _config(state, about, options, path, scripted)
    wanted = parameter_shapes(lambda: Encoder(config))
    visual = {key: t for key, t in state.items() if key.startswith("visual.")}
    text = tuple(sorted(set(state) - set(visual)))  # the text tower: no part of OneLLM
    tensors, ignored, problems = fitted(
        {key: (from_open_clip_name(key.removeprefix("visual.")), t) for key, t in visual.items()},
        wanted,
    )
    return Opened(
        NAME,
        KIND,
        config,
        tensors,
        files,
        path if path.is_dir() else path.parent,
        (*ignored, *text),
        problems,
    )


def _state(path: Path) -> tuple[Tensors, bool]:
    """(state dict, whether the file is a TorchScript archive, as OpenAI's are)."""
    if not path.is_file():
        raise UsageError(f"no checkpoint {path}", "there is nothing to convert.", "check the path.")
    if path.suffix == ".safetensors":
        return read_safetensors(path), False
    tree = read_pickled(path, inert=("__torch__.",))
    scripted = torchscript_state(tree)
    return (scripted, True) if scripted else (state_of(tree, path), False)


def _config(
    state: Tensors, about: dict[str, Any], options: Options, path: Path, scripted: bool
) -> OneLLMVisionConfig:
    for key in (
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.proj",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
    ):
        if key not in state:
            raise unreadable(path, f"it has no {key}: no plain ViT of open_clip")
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vision = about.get("vision_cfg", {})
    act = options.act or (
        "quick_gelu" if scripted or about.get("quick_gelu") else "gelu" if about else None
    )
    if act is None:
        raise UsageError(
            f"{path} does not say its activation",
            "OpenAI's CLIP has quick_gelu, most others gelu; the wrong one is off everywhere and gives no error.",
            f"give --act quick_gelu or --act gelu, or a folder with {CONFIG}.",
        )
    told = {
        "width": (vision.get("width", width), width),
        "patch_size": (vision.get("patch_size", patch), patch),
    }
    if wrong := [
        f"{name} is {says}, the tensors have {has}"
        for name, (says, has) in told.items()
        if says != has
    ]:
        raise UsageError(
            f"{path}: {CONFIG} contradicts the weights: {'; '.join(wrong)}",
            "heads would be wrong.",
            "give the right one.",
        )
    return OneLLMVisionConfig(
        width=width,
        layers=len(
            {key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")}
        ),
        heads=options.encoder_heads or max(1, width // int(vision.get("head_width", HEAD_WIDTH))),
        mlp_ratio=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        patch_size=patch,
        image_size=patch * round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5),
        act=act,
        output_dim=state["visual.proj"].shape[1],
    )


def plan(opened: Opened, options: Options) -> Plan:
    """`open_clip_model.safetensors` with the keys `visual.*`, and its config (the text tower is no part of it)."""
    config: OneLLMVisionConfig = opened.config
    only_clip(config, NAME)
    tensors = tuple(
        (f"visual.{open_clip_name(name)}", tensor) for name, tensor in opened.tensors.items()
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
        about = {
            "embed_dim": config.output_dim,
            "vision_cfg": vision,
            "quick_gelu": config.act == "quick_gelu",
        }
        (folder / CONFIG).write_text(
            json.dumps({"model_cfg": about}, indent=2) + "\n", encoding="utf-8"
        )

    return Plan((TensorFile("open_clip_model.safetensors", tensors),), finish)
