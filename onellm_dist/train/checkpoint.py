"""Checkpoints of the trainable state, elastic: written by ranges, read by ranges, at any number of ranks and any ZeRO stage.

A checkpoint is a folder `step-00000100` (100 steps are done; step index 100 comes next):

    rank-00000.safetensors   what rank 0 held: `<parameter>:<start>:<key>` -> [length] fp32, key one of master, exp_avg, exp_avg_sq
    rank-00001.safetensors   ...
    manifest.json            version, step, optimizer_steps, what the run adds, every file's size, every parameter's shape and pieces

It is written as `.step-00000100.partial`, synced file by file, and renamed when whole. Frozen weights are not in it: they come from
`model.path` or `model.preset` again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from onellm_dist.errors import OneLLMError, UsageError
from onellm_dist.train.distributed import World
from onellm_dist.train.engine.base import STATE_KEYS, Engine, LocalRange

VERSION = 1
MANIFEST = "manifest.json"
PREFIX = "step-"


def save_state(folder: Path, engine: Engine, world: World, about: dict[str, Any]) -> None:
    """Write the trainable state of every rank to `folder`, which appears only when it is whole. Called by all ranks.

    Args:
        about: goes into the manifest as it is (`step`, the seed, ...); the same on every rank.

    Raises:
        OneLLMError: a rank could not write (a full disk); nothing is left of it, and every rank raises.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if world.main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    name = f"rank-{world.rank:05d}.safetensors"
    ranges = engine.ranges()
    failure, size = None, 0
    try:
        size = _write_ranges(partial / name, ranges)
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own RuntimeError
        failure = f"rank {world.rank}: {error}"
    written = world.gather((name, size, [(r.name, r.shape, r.start, r.length) for r in ranges], failure))
    failures = [f for *_, f in written if f]
    if not failures and world.main:
        failures = _finish(partial, folder, written, {**about, "optimizer_steps": engine.optimizer_steps, "world": world.size})
    failures = world.broadcast(failures)
    if failures:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise OneLLMError(
            f"checkpoint {folder} was not written: {failures[0]}",
            "the newest whole checkpoint is the one before it.",
            "make room or mend the file system, and start again.",
        )


def load_state(folder: Path, engine: Engine, world: World) -> dict[str, Any]:
    """Read this rank's ranges from a checkpoint of any world size. Called by all ranks.

    Returns:
        The manifest.

    Raises:
        UsageError: the checkpoint's parameters are not the ones that train here.
        OneLLMError: it is not whole.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise OneLLMError(
            f"checkpoint {folder} is not whole", "it cannot be resumed.", "give another checkpoint directory, or checkpoint.resume=auto."
        )
    _check_parameters(folder, manifest["parameters"], engine.ranges(), world)
    with ExitStack() as stack:
        files = _Files(folder, stack)
        for own in engine.ranges():
            pieces = manifest["parameters"][own.name]["pieces"]
            for key in STATE_KEYS:
                own.write(key, files.read(own, pieces, key))
    engine.restored(int(manifest["optimizer_steps"]))
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole checkpoint, or None: missing, of an unknown version, or a file is missing or cut short."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = manifest["version"] == VERSION and all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, json.JSONDecodeError, KeyError):
        return None
    return manifest if whole else None


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:08d}"


def newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint in `checkpoints` that is whole."""
    return next((folder for folder in reversed(_folders(checkpoints)) if read_manifest(folder) is not None), None)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what unfinished writes left."""
    for folder in _folders(checkpoints)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
    for partial in checkpoints.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def _folders(checkpoints: Path) -> list[Path]:
    return sorted(f for f in checkpoints.glob(f"{PREFIX}*") if f.name.removeprefix(PREFIX).isdigit())


def _write_ranges(path: Path, ranges: Sequence[LocalRange]) -> int:
    tensors = {_key(r.name, r.start, key): r.read(key).detach().to("cpu", torch.float32, copy=True) for r in ranges for key in STATE_KEYS}
    save_file(tensors, path)
    sync(path)
    return path.stat().st_size


def _finish(partial: Path, folder: Path, written: Sequence[tuple[str, int, list[Any], str | None]], about: dict[str, Any]) -> list[str]:
    """Write the manifest and give the folder its name. Returns what failed."""
    parameters: dict[str, Any] = {}
    for file, _, ranges, _ in written:
        for name, shape, start, length in ranges:
            parameters.setdefault(name, {"shape": shape, "pieces": []})["pieces"].append([start, length, file])
    manifest = {"version": VERSION, **about, "files": {file: size for file, size, *_ in written}, "parameters": parameters}
    try:
        path = partial / MANIFEST
        path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(path)
        sync(partial)
        if folder.exists():  # a run that came back to an older checkpoint passes this step a second time
            shutil.rmtree(folder)
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        return [f"rank 0: {error}"]
    return []


def _check_parameters(folder: Path, saved: dict[str, Any], ranges: Sequence[LocalRange], world: World) -> None:
    here = {name: shape for part in world.gather({r.name: r.shape for r in ranges}) for name, shape in part.items()}
    there = {name: tuple(entry["shape"]) for name, entry in saved.items()}
    if here == there:
        return
    wrong = sorted({n for n in here.keys() ^ there.keys()} | {n for n in here.keys() & there.keys() if tuple(here[n]) != there[n]})
    raise UsageError(
        f"checkpoint {folder} holds other trainable parameters than this run: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}",
        "it is from another stage, mixture or model.",
        "give another run.dir, or restore the recipe it was written with (config.yaml beside the checkpoints).",
    )


class _Files:
    """The checkpoint's files, opened when first needed (memory-mapped: only the ranges asked for are read)."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack, self._open = folder, stack, dict[str, Any]()

    def read(self, own: LocalRange, pieces: Sequence[tuple[int, int, str]], key: str) -> torch.Tensor:
        values = torch.empty(own.length, dtype=torch.float32)
        missing = own.length
        for start, length, file in pieces:
            first, end = max(start, own.start), min(start + length, own.start + own.length)
            if first >= end:
                continue
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
            values[first - own.start : end - own.start] = self._open[file].get_slice(_key(own.name, start, key))[
                first - start : end - start
            ]
            missing -= end - first
        if missing:
            raise OneLLMError(
                f"checkpoint {self._folder} lacks {missing} elements of {own.name} ({key})",
                "it cannot be resumed.",
                "give another checkpoint directory.",
            )
        return values


def _key(name: str, start: int, key: str) -> str:
    return f"{name}:{start}:{key}"


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
