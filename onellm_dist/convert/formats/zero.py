"""DeepSpeed's own ZeRO checkpoints (0.19.8), stages 1 to 3, in.

The fp32 weights are in one `*_optim_states.pt` per rank. `onellm train` writes another layout,
which `training_run.py` reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import ConversionOptions, OpenedCheckpoint, TrainedWeights
from onellm_dist.convert.formats import training_run
from onellm_dist.convert.tensors.archive import make_read_error
from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors, concatenate
from onellm_dist.convert.tensors.pickled import read_pickled

NAME = "deepspeed"
KIND = "onellm"
ORDER = 8
ABOUT = "DeepSpeed's own ZeRO checkpoint (or one of our runs')."
EXAMPLE = "run/global_step1000"
DEFAULT_TARGET = "onellm"

INERT = ("deepspeed.", "argparse.", "numpy.", "torch.", "types.")
"""Beginnings of names whose objects (loss scaler, arguments) are skipped, not created."""


def is_format(path: Path) -> bool:
    """Whether a path is a folder of DeepSpeed's files, or has `latest` beside such folders."""
    return path.is_dir() and ((path / "latest").is_file() or any(path.glob("*_optim_states.pt")))


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint | TrainedWeights:
    """Open `global_stepN`, or the folder whose `latest` names it.

    Raises:
        UsageError: not such a folder, a rank's file is missing, or sizes do not agree.
    """
    if training_run.is_format(path):
        return training_run.open_checkpoint(path, options)
    latest = path / "latest"
    folder = path / latest.read_text(encoding="utf-8").strip() if latest.is_file() else path
    optimizer_files = _find_files(folder, "*_optim_states.pt")
    model_files = _find_files(folder, "*_model_states.pt")
    if not optimizer_files or not model_files:
        raise UsageError(
            f"no ZeRO checkpoint in {folder}",
            "*_optim_states.pt and *_model_states.pt hold it.",
            "give global_stepN.",
        )
    ranks = [_read_optimizer(file) for file in optimizer_files]
    model = read_pickled(model_files[0], inert=INERT)
    stage, world_size = int(ranks[0]["zero_stage"]), _get_world_size(ranks[0]["partition_count"])
    if world_size != len(ranks):
        raise UsageError(
            f"{folder}: {len(ranks)} of {world_size} ranks' files are there",
            "each holds a part of every weight.",
            "copy all of them.",
        )
    try:
        if stage <= 2:
            tensors = _open_stage2(ranks, model)
        else:
            models = [model, *(read_pickled(file, inert=INERT) for file in model_files[1:])]
            tensors = _open_stage3(ranks, models, world_size)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise make_read_error(
            folder, f"its layout is not that of DeepSpeed 0.19 ({error})"
        ) from None
    for name in model.get("shared_params") or {}:
        tensors.pop(name, None)  # a tied weight: it is stored under its other name
    notes = {
        "zero stage": stage,
        "world size": world_size,
        "deepspeed": model.get("ds_version"),
        "step": model.get("global_steps"),
    }
    return TrainedWeights(NAME, tensors, (*optimizer_files, *model_files), folder, notes)


def _find_files(folder: Path, pattern: str) -> tuple[Path, ...]:
    """Files of all ranks, by rank."""
    return tuple(
        sorted(folder.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    )


def _read_optimizer(file: Path) -> dict[str, Any]:
    tree = read_pickled(file, inert=INERT)
    found = tree.get("optimizer_state_dict") if isinstance(tree, dict) else None
    if not isinstance(found, dict) or "zero_stage" not in found:
        raise make_read_error(file, "it is not a ZeRO optimizer state")
    return found


def _get_world_size(count: Any) -> int:
    return max(count) if isinstance(count, list) else int(count)


def _open_stage2(ranks: Sequence[dict[str, Any]], model: dict[str, Any]) -> Tensors:
    """Stages 1 and 2: each group of parameters is one flat vector, cut into equal partitions.

    Parameters may be padded.
    """
    tensors: Tensors = {}
    paddings = ranks[0].get("param_alignment_paddings")
    for group, shapes in enumerate(model["param_shapes"]):
        flats = [rank["single_partition_of_fp32_groups"][group] for rank in ranks]
        start = 0
        for index, (name, shape) in enumerate(shapes.items()):
            count = math.prod(shape)
            tensors[name] = _get_range(flats, start, start + count).reshape(tuple(shape))
            start += count + (paddings[group][index] if paddings is not None else 0)
        _check_consumed(start, sum(f.numel for f in flats), 2 * len(ranks))
    frozen = model.get("frozen_param_fragments") or {}
    shapes = model.get("frozen_param_shapes") or {}
    return tensors | {name: frozen[name].reshape(tuple(s)) for name, s in shapes.items()}


def _open_stage3(
    ranks: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]], world_size: int
) -> Tensors:
    """Stage 3: each parameter is cut into equal parts, one for each rank.

    The parts of a rank follow each other through its flat vectors.
    """
    tensors: Tensors = {}
    start = 0
    shapes = {n: s for group in models[0]["param_shapes"] for n, s in group.items()}
    for name, shape in shapes.items():
        count = math.prod(shape)
        part = -(-count // world_size)
        # The parts of the last ranks are padded.
        held = [min(part, max(0, count - rank * part)) for rank in range(world_size)]
        pieces = [
            _get_range(ranks[rank]["fp32_flat_groups"], start, start + held[rank])
            for rank in range(world_size)
            if held[rank]
        ]
        tensors[name] = concatenate(pieces).reshape(tuple(shape))
        start += part
    _check_consumed(start, sum(f.numel for f in ranks[0]["fp32_flat_groups"]), 1)
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        flat = concatenate([_flatten_fragment(model, name) for model in models])
        tensors[name] = flat.elements(0, math.prod(shape)).reshape(tuple(shape))
    return tensors


def _flatten_fragment(model: dict[str, Any], name: str) -> LazyTensor:
    fragment: LazyTensor = model["frozen_param_fragments"][name]
    return fragment.reshape((fragment.numel,))


def _get_range(flats: Sequence[LazyTensor], start: int, end: int) -> LazyTensor:
    """Elements [start, end) of vectors that follow each other."""
    parts, at = [], 0
    for flat in flats:
        first, last = max(start, at), min(end, at + flat.numel)
        if first < last:
            parts.append(flat.elements(first - at, last - at))
        at += flat.numel
    if end > at:
        raise IndexError(f"{end} elements are wanted, {at} exist")
    return concatenate(parts) if parts else flats[0].elements(0, 0)


def _check_consumed(used: int, stored: int, alignment: int) -> None:
    if -(-used // alignment) != -(-stored // alignment):
        raise IndexError(f"{used} of {stored} elements belong to parameters")
