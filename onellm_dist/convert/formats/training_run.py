"""Checkpoints of our own runs: trainable ranges by rank, of any engine and any number of ranks, in.

`train/checkpoint/folder.py` describes the layout. The frozen weights are not in a checkpoint: they
come from the run's `model.path` or `model.preset` again. The result is what the run itself would
export: every weight in the dtype that the run computes in.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import sha256_file
from onellm_dist.common.logging import get_logger
from onellm_dist.common.run_files import (
    CHECKPOINT_MANIFEST,
    CHECKPOINT_PREFIX,
    CHECKPOINTS,
    CONFIG,
    METRICS,
)
from onellm_dist.convert.adapters import compute_scaling, merge_adapters, split_adapters
from onellm_dist.convert.checkpoint import (
    ConversionOptions,
    KeyProblem,
    OpenedCheckpoint,
    cast_tensors,
)
from onellm_dist.convert.formats import onellm
from onellm_dist.convert.formats.preset_model import open_preset
from onellm_dist.convert.new_parameters import copy_projector, draw_tensors
from onellm_dist.convert.run_manifest import check_manifest, read_manifest
from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors, concatenate
from onellm_dist.convert.tensors.safetensors_files import read_safetensors
from onellm_dist.model.adapters.folder import describe_rounding
from onellm_dist.model.adapters.lora import get_base_name
from onellm_dist.model.spans.positions import SPAN_ROWS, set_span_positions
from onellm_dist.model.spans.trained import check_spans, set_spans

NAME = "run"
KIND = "onellm"
ORDER = 7
ABOUT = "A checkpoint of one of our runs (any engine, any number of ranks), or the run directory."
EXAMPLE = "runs/stage1_image"
DEFAULT_TARGET = "onellm"

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_log = get_logger(__name__)
MASTER = "master"
"""The state key of the fp32 weights, whatever the optimizer; its own state has other keys."""


def is_format(path: Path) -> bool:
    """Whether a path is a checkpoint folder `step-...`, or a run directory with some."""
    return read_manifest(path) is not None or (path / CHECKPOINTS).is_dir()


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open `<run>/checkpoints/step-...`, or the latest complete checkpoint of a run directory.

    Args:
        path: the folder of the checkpoint or of the run.
        options: `base` names the model that the run started from, if its `model.path` is not found.

    Raises:
        UsageError: there is no complete checkpoint, or no base.
        OneLLMError: the checkpoint lacks elements of a parameter.
    """
    folder = _find_latest(path) if read_manifest(path) is None else path
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(
            f"no checkpoint in {path}",
            f"a checkpoint has {CHECKPOINT_MANIFEST} and the files of its ranks.",
            "give a step-... folder of a run.",
        )
    check_manifest(folder, manifest)
    files = _find_files(folder, manifest)
    run = folder.resolve().parent.parent
    recipe = _read_recipe(run)
    precision = _read_precision(run, recipe)
    dtype = _DTYPES[precision or "fp32"]
    base = _open_base(manifest.get("model", {}), int(manifest.get("seed", 0)), run, options)
    spans = _find_trained_spans(manifest, folder, run, recipe)
    base = _set_trained_spans(_check_base(base, manifest, folder), spans)
    adapters, trained = split_adapters(_open_trained(folder, manifest))
    trained = {get_base_name(name): tensor for name, tensor in trained.items()}
    wanted = onellm.get_onellm_shapes(base.config)
    unexpected = _list_unexpected(trained, wanted)
    tensors = {name: trained.get(name, tensor) for name, tensor in base.tensors.items()}
    tensors, problems = _merge(tensors, adapters, manifest, dtype)
    # Checkpoints of 0.1.0 have `step`, `world` and no optimizer.
    steps_done = manifest.get("steps_done", manifest.get("step"))
    notes = {
        "steps done": steps_done,
        **_describe(manifest),
        **_describe_reading(precision, spans),
        "trained tensors": f"{len(trained)} of {len(wanted)}",
        **({"tensors of adapters": len(adapters)} if adapters else {}),
        "rounding": _describe_rounding(manifest),
        **_read_metrics(run, steps_done),
    }
    return replace(
        base,
        format=NAME,
        tensors=cast_tensors(tensors, options.dtype or dtype),
        files=(*files, *base.files),
        ignored=(),
        problems=(*base.problems, *unexpected, *problems),
        notes=notes,
        checksums={
            **base.checksums,
            **{folder / name: digest for name, digest in manifest.get("sha256", {}).items()},
        },
    )


def _list_unexpected(trained: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> list[KeyProblem]:
    """Trained tensors that the model does not have, or has in another shape."""
    return [
        KeyProblem("unexpected", name, str(list(tensor.shape)))
        for name, tensor in trained.items()
        if wanted.get(name) != tensor.shape
    ]


def _merge(
    tensors: Tensors, adapters: Tensors, manifest: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensors, list[KeyProblem]]:
    """The tensors with the adapters of a run merged, as the run exports them."""
    if not adapters:
        return tensors, []
    scaling = compute_scaling(manifest.get("lora") or {})
    return merge_adapters(tensors, adapters, scaling, dtype)


def _describe_reading(precision: str | None, spans: dict[str, int] | None) -> dict[str, Any]:
    """How the run computed and read media, and what of it nothing says."""
    notes = {"precision": precision or "unknown; fp32 assumed"}
    return notes if spans is not None else notes | {"spans": "unknown; those of the base assumed"}


def _describe_rounding(manifest: dict[str, Any]) -> str | None:
    """Whether the run trained beside rounded weights."""
    frozen = manifest.get("frozen")
    return describe_rounding(frozen.get("frozen_weights") if isinstance(frozen, dict) else None)


def _describe(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the manifest states about the run, for people."""
    optimizer = manifest.get("optimizer")
    return {
        "stage": manifest.get("stage"),
        "world size": manifest.get("world_size", manifest.get("world")),
        "optimizer": optimizer.get("name") if isinstance(optimizer, dict) else None,
        "optimizer steps": manifest.get("optimizer_steps"),
        "seed": manifest.get("seed"),
        "plan": manifest.get("plan"),
    }


def _find_latest(path: Path) -> Path:
    folders = sorted((path / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*"))
    found = [folder for folder in folders if read_manifest(folder) is not None]
    if not found:
        raise UsageError(
            f"no checkpoint in {path}",
            "there is nothing to convert.",
            f"give a run directory or one of its {CHECKPOINTS}/step-....",
        )
    return found[-1]


def _find_files(folder: Path, manifest: dict[str, Any]) -> tuple[Path, ...]:
    """The files of a checkpoint, all of which must be complete."""
    wrong = []
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} of {size} bytes")
    if wrong:
        raise UsageError(
            f"{folder} is not complete: {'; '.join(wrong)}",
            "trained weights would be lost.",
            "give another checkpoint of the run.",
        )
    return tuple(folder / name for name in sorted(manifest["files"]))


def _check_base(base: OpenedCheckpoint, manifest: dict[str, Any], folder: Path) -> OpenedCheckpoint:
    """The base with the checksums of the files that the run was trained over.

    Raises:
        UsageError: it has other files.
    """
    frozen = manifest.get("frozen")
    recorded = frozen.get("files") if isinstance(frozen, dict) else None
    if not isinstance(recorded, dict) or not base.files:
        return base
    sums = {name: entry[2] for name, entry in recorded.items() if isinstance(entry, list)}
    config = base.root / "config.json"
    wrong = sorted({path.name for path in base.files} - sums.keys())
    if "config.json" in sums and sha256_file(config) != sums["config.json"]:
        wrong.append("config.json")
    if wrong:
        raise UsageError(
            f"{base.root} has other files than the run {folder} was trained over: "
            f"{', '.join(wrong)}",
            "trained weights mean nothing over other frozen weights.",
            "give the model that the run started from: --base DIR.",
        )
    checked = {path: str(sums[path.name]) for path in base.files}
    return replace(base, checksums={**base.checksums, **checked})


def _open_trained(folder: Path, manifest: dict[str, Any]) -> Tensors:
    """The fp32 weights of all parameters that the run trains."""
    ranges: Tensors = {}
    for name in manifest["files"]:
        for key, tensor in read_safetensors(folder / name).items():
            ranges[f"{name}/{key}"] = tensor
    return {
        name: _join_ranges(folder, name, entry, ranges)
        for name, entry in manifest["parameters"].items()
    }


def _join_ranges(folder: Path, name: str, entry: dict[str, Any], ranges: Tensors) -> LazyTensor:
    """A parameter's fp32 weights from the ranges of all ranks."""
    shape = tuple(entry["shape"])
    pieces = sorted((start, length, file) for start, length, file in entry["pieces"])
    at = 0
    parts: list[LazyTensor] = []
    for start, length, file in pieces:
        part = ranges.get(f"{file}/{name}:{start}:{MASTER}")
        if start != at or part is None or part.numel != length:
            raise OneLLMError(
                f"checkpoint {folder} lacks elements of {name} from {at} on",
                "it is not complete.",
                "give another checkpoint.",
            )
        parts.append(part)
        at += length
    if at != torch.Size(shape).numel():
        raise OneLLMError(
            f"checkpoint {folder} has {at} elements of {name} {list(shape)}",
            "it is not complete.",
            "give another checkpoint.",
        )
    return concatenate(parts).reshape(shape)


def _read_metrics(run: Path, steps_done: object) -> dict[str, Any]:
    """Loss and sample digest of the checkpoint's last step; the run may have continued since."""
    try:
        lines = (run / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if not isinstance(found, dict):
            continue
        if isinstance(steps_done, int) and found.get("step") == steps_done - 1:
            return {
                "loss of the last step": found.get("loss"),
                "sample_digest of the last step": found.get("sample_digest"),
            }
    return {}


def _read_recipe(run: Path) -> dict[str, Any] | None:
    """What `config.yaml` of a run has; None if there is no such file."""
    path = run / CONFIG
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        reason = "" if isinstance(found, dict) else "it is not a mapping"
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    if reason:
        raise UsageError(
            f"{path} cannot be read: {reason}",
            "it says how the run computes and reads media.",
            "restore the file, or remove it and give --dtype.",
        )
    return dict(found)


def _read_precision(run: Path, recipe: dict[str, Any] | None) -> str | None:
    if recipe is None:
        return None
    train = recipe.get("train")
    found = train.get("precision") if isinstance(train, dict) else train
    if str(found) not in _DTYPES:
        raise UsageError(
            f"{run / CONFIG}: train.precision is {str(found)[:200]}",
            "the model is written in the precision that the run computes in.",
            "restore the file, or remove it and give --dtype.",
        )
    return str(found)


def _find_trained_spans(
    manifest: dict[str, Any], folder: Path, run: Path, recipe: dict[str, Any] | None
) -> dict[str, int] | None:
    """`data.spans` of a checkpoint; None, with a warning: nothing says what it was.

    Checkpoints of 0.2.0 and earlier do not say it; `config.yaml` is that of the latest start.
    """
    if "spans" in manifest:
        return check_spans(manifest["spans"], f"{folder / CHECKPOINT_MANIFEST}: spans")
    if recipe is None:
        _log.warning(
            "%s does not say what data.spans was, and there is no %s: the spans of the base are "
            "taken. If the run had others, convert from its own directory.",
            *(folder, run / CONFIG),
        )
        return None
    data = recipe.get("data") or {}
    spans = data.get("spans") if isinstance(data, dict) else data
    return check_spans(spans, f"{run / CONFIG}: data.spans")


def _set_trained_spans(base: OpenedCheckpoint, spans: dict[str, int] | None) -> OpenedCheckpoint:
    """The model with the `data.spans` of the run, also where its base has others."""
    if spans is None:
        return base
    config = copy.deepcopy(base.config)
    set_spans(config, spans)
    return replace(base, config=config)


def _open_base(
    model: dict[str, Any], seed: int, run: Path, options: ConversionOptions
) -> OpenedCheckpoint:
    """What the run started from: a directory, or a preset drawn again from its seed."""
    path, preset = options.base or model.get("path"), model.get("preset")
    if path is not None:
        folder = next((p for p in (Path(path), run / path) if onellm.is_format(p)), None)
        if folder is None:
            raise UsageError(
                f"the run started from {path}, which is not a onellm directory here",
                "its frozen weights are not in the checkpoint.",
                "give --base DIR.",
            )
        base = onellm.open_checkpoint(folder, options)
    elif preset is not None:
        base = open_preset(str(preset), seed)
    else:
        raise UsageError(
            f"{run}: the checkpoint does not state what the run started from",
            "frozen weights come from it.",
            "give --base DIR.",
        )
    base = _add_span_positions(base, model.get("span_positions"))
    source = base.config.modalities[0] if base.config.modalities else ""
    tensors = dict(base.tensors)
    for name in model.get("init_from_image") or ():
        tensors |= copy_projector(base.tensors, source, name)
    return replace(base, tensors=tensors)


def _add_span_positions(base: OpenedCheckpoint, kind: str | None) -> OpenedCheckpoint:
    """The model with the span positions that the run's recipe gave it; learned ones are zero."""
    if kind in (None, base.config.span_positions):
        return base
    config = copy.deepcopy(base.config)
    set_span_positions(config, kind)
    rows = [name for name in onellm.get_onellm_shapes(config) if name.endswith(SPAN_ROWS)]
    added = draw_tensors(config, 0, rows)
    return replace(base, config=config, tensors={**base.tensors, **added})
