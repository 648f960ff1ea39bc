"""DeepSpeed's own ZeRO checkpoints (0.19.8): fp32 weights in `*_optim_states.pt`, one a rank; stages 1, 2 and 3; in.

`onellm train` writes another layout (see elastic.py, which this format hands our own checkpoints to).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import Opened, Options, Tensors
from onellm_dist.convert.formats import training_run as elastic
from onellm_dist.convert.overlay import overlaid
from onellm_dist.convert.tensors.lazy import LazyTensor, concatenated
from onellm_dist.convert.tensors.pickled import read_pickled, unreadable

NAME = "deepspeed"
INERT = ("deepspeed.", "argparse.", "numpy.", "torch.", "types.")
"""Objects of these that a checkpoint holds beside tensors (loss scaler, addresses, arguments) are skipped, not made."""


def recognise(path: Path) -> bool:
    """A folder of DeepSpeed's files, or one with `latest` beside such folders."""
    return path.is_dir() and ((path / "latest").is_file() or any(path.glob("*_optim_states.pt")))


def open_checkpoint(path: Path, options: Options) -> Opened:
    """Open `global_stepN`, or the folder whose `latest` names it; `--base` gives config and frozen weights.

    Raises:
        UsageError: not such a folder, a rank's file is missing, or sizes do not agree.
    """
    if elastic.recognise(path):
        return elastic.open_checkpoint(path, options)
    folder = (
        path / (path / "latest").read_text(encoding="utf-8").strip()
        if (path / "latest").is_file()
        else path
    )
    optim, model = _sorted(folder, "*_optim_states.pt"), _sorted(folder, "*_model_states.pt")
    if not optim or not model:
        raise UsageError(
            f"no ZeRO checkpoint in {folder}",
            "*_optim_states.pt and *_model_states.pt hold it.",
            "give global_stepN.",
        )
    ranks = [_optimizer_of(file) for file in optim]
    about = read_pickled(model[0], inert=INERT)
    stage, world = int(ranks[0]["zero_stage"]), _world(ranks[0]["partition_count"])
    if world != len(ranks):
        raise UsageError(
            f"{folder}: {len(ranks)} of {world} ranks' files are there",
            "each holds a part of every weight.",
            "copy all of them.",
        )
    try:
        if stage <= 2:
            tensors = _stage2(ranks, about)
            frozen = about.get("frozen_param_fragments") or {}
            tensors |= {
                n: frozen[n].reshaped(tuple(s))
                for n, s in (about.get("frozen_param_shapes") or {}).items()
            }
        else:
            tensors = _stage3(ranks, about, world)
            tensors |= _frozen3(about, [about, *(read_pickled(f, inert=INERT) for f in model[1:])])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise unreadable(
            folder, f"it is laid out otherwise than DeepSpeed 0.19 does ({error})"
        ) from None
    for pair in about.get("shared_params") or {}:
        tensors.pop(pair, None)  # a tied weight: it stands under its other name
    notes = {
        "zero stage": stage,
        "world size": world,
        "deepspeed": about.get("ds_version"),
        "step": about.get("global_steps"),
    }
    return overlaid(NAME, folder, tensors, (*optim, *model), options, notes)


def _sorted(folder: Path, pattern: str) -> tuple[Path, ...]:
    return tuple(
        sorted(folder.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    )


def _optimizer_of(file: Path) -> dict[str, Any]:
    tree = read_pickled(file, inert=INERT)
    found = tree.get("optimizer_state_dict") if isinstance(tree, dict) else None
    if not isinstance(found, dict) or "zero_stage" not in found:
        raise unreadable(file, "it is no ZeRO optimizer state")
    return found


def _world(count: Any) -> int:
    return max(count) if isinstance(count, list) else int(count)


def _stage2(ranks: list[dict[str, Any]], about: dict[str, Any]) -> Tensors:
    """Stages 1 and 2: each group of parameters is one flat vector, cut into equal partitions; parameters may be padded."""
    tensors: Tensors = {}
    paddings = ranks[0].get("param_alignment_paddings")
    for group, shapes in enumerate(about["param_shapes"]):
        flats = [rank["single_partition_of_fp32_groups"][group] for rank in ranks]
        at = 0
        for index, (name, shape) in enumerate(shapes.items()):
            count = math.prod(shape)
            tensors[name] = _range(flats, at, at + count).reshaped(tuple(shape))
            at += count + (paddings[group][index] if paddings is not None else 0)
        _check_consumed(at, sum(f.numel for f in flats), 2 * len(ranks))
    return tensors


def _stage3(ranks: list[dict[str, Any]], about: dict[str, Any], world: int) -> Tensors:
    """Stage 3: each parameter is cut into equal parts; a rank's parts follow each other through its flat vectors."""
    tensors: Tensors = {}
    at = 0
    for name, shape in {n: s for group in about["param_shapes"] for n, s in group.items()}.items():
        count = math.prod(shape)
        part = -(-count // world)
        held = [
            min(part, max(0, count - rank * part)) for rank in range(world)
        ]  # the last ranks' parts are padded
        pieces = [
            _range(ranks[rank]["fp32_flat_groups"], at, at + held[rank])
            for rank in range(world)
            if held[rank]
        ]
        tensors[name] = concatenated(pieces).reshaped(tuple(shape))
        at += part
    _check_consumed(at, sum(f.numel for f in ranks[0]["fp32_flat_groups"]), 1)
    return tensors


def _frozen3(about: dict[str, Any], models: list[dict[str, Any]]) -> Tensors:
    shapes = about.get("frozen_param_shapes") or {}
    return {
        name: concatenated([_flat(model, name) for model in models])
        .elements(0, math.prod(shape))
        .reshaped(tuple(shape))
        for name, shape in shapes.items()
    }


def _flat(model: dict[str, Any], name: str) -> LazyTensor:
    fragment: LazyTensor = model["frozen_param_fragments"][name]
    return fragment.reshaped((fragment.numel,))


def _range(flats: list[LazyTensor], start: int, end: int) -> LazyTensor:
    """Elements [start, end) of vectors that follow each other."""
    parts, at = [], 0
    for flat in flats:
        first, last = max(start, at), min(end, at + flat.numel)
        if first < last:
            parts.append(flat.elements(first - at, last - at))
        at += flat.numel
    if end > at:
        raise IndexError(f"{end} elements are wanted, {at} are there")
    return concatenated(parts) if parts else flats[0].elements(0, 0)


def _check_consumed(used: int, there: int, alignment: int) -> None:
    if -(-used // alignment) != -(-there // alignment):
        raise IndexError(f"{used} of {there} elements belong to parameters")
