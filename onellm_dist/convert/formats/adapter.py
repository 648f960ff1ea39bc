"""The folder of an adapter (PEFT's), in: it is merged into the model that it was trained over."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.adapters import compute_scaling, merge_adapters
from onellm_dist.convert.checkpoint import ConversionOptions, OpenedCheckpoint
from onellm_dist.convert.formats import onellm
from onellm_dist.convert.formats.preset_model import open_preset
from onellm_dist.convert.tensors.safetensors_files import read_safetensors
from onellm_dist.model.adapters.folder import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    check_base,
    check_weights,
    describe_rounding,
    is_adapter,
    read_base,
)
from onellm_dist.model.adapters.lora import ADAPTER
from onellm_dist.model.spans.trained import read_saved_spans, set_spans

NAME = "adapter"
KIND = "onellm"
ORDER = 10
ABOUT = "The folder of an adapter (LoRA), merged into the model that it was trained over."
EXAMPLE = "runs/tune_lora/adapter"
DEFAULT_TARGET = "onellm"

PLAIN = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "lora_bias")
"""Keys of PEFT's configuration that have to be empty."""


def is_format(path: Path) -> bool:
    """Whether a path is the folder of an adapter over a OneLLM."""
    return is_adapter(path) and onellm.has_config(path)


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open the folder of an adapter.

    Args:
        path: the folder.
        options: `base` names the model that it was trained over, if that has moved.

    Raises:
        UsageError: its base is not there or another one, or it is of a kind that is not merged
            here.
    """
    config = _read_config(path)
    check_weights(path)
    base = read_base(path, options.base)
    check_base(path, base)
    if base.path is None:
        opened = open_preset(str(base.preset), base.seed)
    else:
        opened = onellm.open_checkpoint(base.path, options)
    adapters = {
        _get_own_name(name): tensor for name, tensor in read_safetensors(path / WEIGHTS).items()
    }
    scale = {"rank": config["r"], "alpha": config["lora_alpha"], "rslora": config.get("use_rslora")}
    tensors, problems = merge_adapters(opened.tensors, adapters, compute_scaling(scale), None)
    adapted = copy.deepcopy(opened.config)
    spans = read_saved_spans(path)
    if spans is not None:
        set_spans(adapted, spans)
    return replace(
        opened,
        format=NAME,
        config=adapted,
        tensors=tensors,
        files=(path / WEIGHTS, *opened.files),
        root=path,
        problems=(*opened.problems, *problems),
        notes={
            "adapter": str(path),
            "rank": config["r"],
            "base": str(base.path or base.preset),
            "rounding": describe_rounding(base.frozen_weights),
        },
    )


def _read_config(path: Path) -> dict[str, Any]:
    source = path / CONFIG
    try:
        found: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        kind, given = found["peft_type"], [key for key in PLAIN if found.get(key)]
        found["r"], found["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{source} cannot be read: {error!r}",
            "it says how the adapter is added to its base.",
            "copy the folder of the adapter again.",
        ) from None
    if kind != "LORA" or given or found.get("bias", "none") != "none":
        what = kind if kind != "LORA" else ", ".join(given) or "bias"
        raise UsageError(
            f"{source}: {what} is not merged here",
            "only plain LoRA and DoRA are.",
            "merge it with PEFT: PeftModel.from_pretrained(base, FOLDER).merge_and_unload().",
        )
    return found


def _get_own_name(name: str) -> str:
    """The name of a parameter in the model, by the name under which PEFT saves it."""
    name = name.removeprefix(PREFIX)
    if name.endswith(".lora_magnitude_vector"):
        return f"{name}.{ADAPTER}.weight"
    return name.removesuffix(".weight") + f".{ADAPTER}.weight"
