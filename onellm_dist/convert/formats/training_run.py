"""Checkpoints of our own runs: trainable ranges by rank (train/checkpoint/state.py), any engine and any number of ranks, in.

The frozen weights are not in them: they come from the run's `model.path` or `model.preset` again. The result is what the run
itself would export: every weight in the dtype the run computes in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.convert.checkpoint import Opened, Options, Problem, Tensors, cast_all, with_prefix
from onellm_dist.convert.formats import gguf, onellm
from onellm_dist.convert.new_parameters import copied_projector, fresh_tensors
from onellm_dist.convert.tensors.lazy import LazyTensor
from onellm_dist.convert.tensors.safetensors_files import read_safetensors
from onellm_dist.model.presets import TOY_TOKENIZER, build_config, find_smollm2_gguf

NAME, KIND = "run", "onellm"
MANIFEST, VERSIONS = "manifest.json", (1, 2)
"""Version 2 added checksums."""
MASTER = "master"
"""The key of the fp32 weights; the others are Adam's."""


def recognise(path: Path) -> bool:
    """A checkpoint folder `step-...`, or a run directory with some."""
    return _manifest_of(path) is not None or (path / "checkpoints").is_dir()


def open_checkpoint(path: Path, options: Options) -> Opened:
    """Open `<run>/checkpoints/step-...`, or the newest whole checkpoint of a run directory.

    Args:
        options: `base` names the model that the run started from, where its `model.path` is not found.

    Raises:
        UsageError: no whole checkpoint, or no base.
    """
    folder = _newest(path) if _manifest_of(path) is None else path
    manifest = _manifest_of(folder)
    if manifest is None:
        raise UsageError(
            f"no checkpoint in {path}",
            "a manifest.json and ranges are expected.",
            "give a step-... folder of a run.",
        )
    files = _whole_files(folder, manifest)
    run = folder.parent.parent
    precision = _precision(run)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision or "fp32"]
    base = _base(manifest.get("model", {}), int(manifest.get("seed", 0)), run, options)
    trained = _trained(folder, manifest)
    wanted = onellm.onellm_shapes(base.config)
    strange = [
        Problem("unexpected", name, str(list(t.shape)))
        for name, t in trained.items()
        if wanted.get(name) != t.shape
    ]
    tensors = cast_all(
        {name: trained.get(name, tensor) for name, tensor in base.tensors.items()},
        options.dtype or dtype,
    )
    steps_done = manifest.get("steps_done", manifest.get("step"))
    notes = {
        "steps done": steps_done,
        "stage": manifest.get("stage"),
        "world size": manifest.get("world_size", manifest.get("world")),
        "optimizer steps": manifest.get("optimizer_steps"),
        "precision": precision or "unknown (fp32 taken)",
        "trained tensors": f"{len(trained)} of {len(wanted)}",
        "seed": manifest.get("seed"),
        "plan": manifest.get("plan"),
        **_figures(run, steps_done),
    }
    return Opened(
        NAME,
        KIND,
        base.config,
        tensors,
        (*files, *base.files),
        base.root,
        (),
        (*base.problems, *strange),
        notes,
    )


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    whole = isinstance(manifest, dict) and {"parameters", "files", "version"} <= set(manifest)
    return manifest if whole and isinstance(manifest["parameters"], dict) else None


def _newest(path: Path) -> Path:
    found = [
        f for f in sorted((path / "checkpoints").glob("step-*")) if _manifest_of(f) is not None
    ]
    if not found:
        raise UsageError(
            f"no checkpoint in {path}",
            "there is nothing to convert.",
            "give a run directory or one of its checkpoints/step-....",
        )
    return found[-1]


def _whole_files(folder: Path, manifest: dict[str, Any]) -> tuple[Path, ...]:
    if manifest["version"] not in VERSIONS:
        raise UsageError(
            f"{folder}: version {manifest['version']}",
            f"this program reads versions {VERSIONS}.",
            "convert it with its own version.",
        )
    wrong = []
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} of {size} bytes")
    if wrong:
        raise UsageError(
            f"{folder} is not whole: {'; '.join(wrong)}",
            "trained weights would be lost.",
            "give another checkpoint of the run.",
        )
    return tuple(folder / name for name in sorted(manifest["files"]))


def _trained(folder: Path, manifest: dict[str, Any]) -> Tensors:
    ranges: Tensors = {}
    for name in manifest["files"]:
        ranges |= {
            f"{name}/{key}": tensor for key, tensor in read_safetensors(folder / name).items()
        }
    return {
        name: _joined(folder, name, entry, ranges) for name, entry in manifest["parameters"].items()
    }


def _joined(folder: Path, name: str, entry: dict[str, Any], ranges: Tensors) -> LazyTensor:
    """A parameter's fp32 weights from the ranges of all ranks."""
    shape = tuple(entry["shape"])
    pieces = sorted((start, length, file) for start, length, file in entry["pieces"])
    at, parts = 0, []
    for start, length, file in pieces:
        part = ranges.get(f"{file}/{name}:{start}:{MASTER}")
        if start != at or part is None or part.numel != length:
            raise OneLLMError(
                f"checkpoint {folder} lacks elements of {name} from {at} on",
                "it is not whole.",
                "give another checkpoint.",
            )
        parts.append(part)
        at += length
    if at != torch.Size(shape).numel():
        raise OneLLMError(
            f"checkpoint {folder} has {at} elements of {name} {list(shape)}",
            "it is not whole.",
            "give another checkpoint.",
        )

    def stream() -> Iterator[torch.Tensor]:
        for part in parts:
            yield from part.blocks()

    return LazyTensor(shape, torch.float32, _loader(parts), stream)


def _loader(parts: list[LazyTensor]) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat([part.read() for part in parts])


def _figures(run: Path, steps: object) -> dict[str, Any]:
    """Loss and sample digest of the checkpoint's last step, from the run's metrics (it may have gone on since)."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed
        if isinstance(steps, int) and found.get("step") == steps - 1:
            return {
                "loss of the last step": found.get("loss"),
                "sample_digest of the last step": found.get("sample_digest"),
            }
    return {}


def _precision(run: Path) -> str | None:
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return str(config["train"]["precision"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _base(about: dict[str, Any], seed: int, run: Path, options: Options) -> Opened:
    """What the run started from: a directory, or a preset drawn again from its seed."""
    path, preset = options.base or about.get("path"), about.get("preset")
    if path is not None:
        folder = next((p for p in (Path(path), run / path) if onellm.recognise(p)), None)
        if folder is None:
            raise UsageError(
                f"the run started from {path}, which is no onellm directory here",
                "its frozen weights are not in the checkpoint.",
                "give --base DIR.",
            )
        base = onellm.open_checkpoint(folder, options)
    elif preset is not None:
        base = _preset(str(preset), seed)
    else:
        raise UsageError(
            f"{run}: the checkpoint does not say what the run started from",
            "frozen weights come from it.",
            "give --base DIR.",
        )
    source = base.config.modalities[0] if base.config.modalities else ""
    tensors = dict(base.tensors)
    for name in about.get("init_from_image") or ():
        tensors |= copied_projector(base.tensors, source, name)
    return Opened(base.format, KIND, base.config, tensors, base.files, base.root, (), base.problems)


def _preset(name: str, seed: int) -> Opened:
    config = build_config(name)
    tensors = fresh_tensors(config, seed)
    if name != "smollm2-135m":
        return Opened("preset", KIND, config, tensors, (), TOY_TOKENIZER)
    llm = gguf.open_checkpoint(find_smollm2_gguf(), Options())
    return Opened(
        "preset",
        KIND,
        config,
        {**tensors, **with_prefix(cast_all(llm.tensors, torch.float32), "llm.")},
        llm.files,
        llm.root,
    )
