"""Reading a checkpoint into an engine: at any number of ranks, from any engine, range by range."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.config.train_sections import LoraSection
from onellm_dist.train.checkpoint.folder import make_tensor_name, read_manifest
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine, LocalRange
from onellm_dist.train.optim.base import OptimizerComponent

FIRST_OPTIMIZER = {"name": "adamw", "state_keys": ["exp_avg", "exp_avg_sq"]}
"""The optimizer of checkpoints that do not name one: those of 0.1.0."""


def load_state(folder: Path, engine: Engine, dist: Distributed) -> dict[str, Any]:
    """Read this rank's ranges from a checkpoint of any world size. All ranks call it.

    Returns:
        The manifest.

    Raises:
        UsageError: the checkpoint's parameters are not those that train here, or its optimizer is
            not this run's.
        OneLLMError: the checkpoint is not complete, or its files are not what its manifest says.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise OneLLMError(
            f"checkpoint {folder} is not complete",
            "it cannot be resumed.",
            "give another checkpoint directory, or set checkpoint.resume=auto.",
        )
    check_optimizer(folder, manifest, engine.optimizer)
    _check_parameters(folder, manifest["parameters"], engine.ranges(), dist)
    with ExitStack() as stack:
        files = _CheckpointFiles(folder, stack)
        for own in engine.ranges():
            pieces = manifest["parameters"][own.name]["pieces"]
            for key in engine.state_keys:
                own.write(key, files.read(own, pieces, key))
    engine.finish_restore(int(manifest["optimizer_steps"]))
    return manifest


def check_optimizer(folder: Path, manifest: dict[str, Any], optimizer: OptimizerComponent) -> None:
    """Refuse a checkpoint whose optimizer keeps other state than this run's.

    Raises:
        UsageError: another optimizer, or the same one with other state.
    """
    here = optimizer.describe()
    saved = manifest.get("optimizer", FIRST_OPTIMIZER)
    if saved != here:
        raise UsageError(
            f"checkpoint {folder} was written with optim.name={saved['name']} (state: "
            f"{', '.join(saved['state_keys']) or 'none'}), and this run has "
            f"optim.name={here['name']} (state: {', '.join(here['state_keys']) or 'none'})",
            "an optimizer cannot continue with the state of another.",
            "set optim.name and optim.options as they were, or start another run from the "
            "exported model (model.path).",
        )


def check_adapters(folder: Path, manifest: dict[str, Any], lora: LoraSection | None) -> None:
    """Refuse a checkpoint whose adapters are added to their layers in another way than here.

    Raises:
        UsageError: another scale, or with and without DoRA.
    """
    here = None if lora is None else lora.model_dump(mode="json", exclude={"targets"})
    saved = manifest.get("lora")
    there = None if saved is None else {key: saved.get(key) for key in here or saved}
    if here is not None and there is not None and here != there:
        different = [f"{key} was {there[key]}" for key in here if here[key] != there[key]]
        raise UsageError(
            f"checkpoint {folder} has other adapters than train.lora says: {', '.join(different)}",
            "the same numbers would mean another model.",
            "restore train.lora, or set another run.dir.",
        )


def _check_parameters(
    folder: Path, saved: dict[str, Any], ranges: Sequence[LocalRange], dist: Distributed
) -> None:
    here = {
        name: shape
        for part in dist.gather({r.name: r.shape for r in ranges})
        for name, shape in part.items()
    }
    there = {name: tuple(entry["shape"]) for name, entry in saved.items()}
    if here == there:
        return
    wrong = sorted(
        set(here.keys() ^ there.keys())
        | {n for n in here.keys() & there.keys() if tuple(here[n]) != there[n]}
    )
    raise UsageError(
        f"checkpoint {folder} holds other trainable parameters than this run: "
        f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}",
        "it is from another stage, mixture or model, or other train.parameters or train.lora.",
        "set another run.dir, or restore the recipe that it was written with (config.yaml beside "
        "the checkpoints).",
    )


class _CheckpointFiles:
    """A checkpoint's files, opened on first use and memory-mapped: only wanted ranges are read."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._open = dict[str, Any]()

    def read(
        self, own: LocalRange, pieces: Sequence[tuple[int, int, str]], key: str
    ) -> torch.Tensor:
        """[own.length] fp32: the values of `own`, from all pieces (start, length, file) of it."""
        values = torch.empty(own.length, dtype=torch.float32)
        missing = own.length
        for start, length, file in pieces:
            first = max(start, own.start)
            end = min(start + length, own.start + own.length)
            if first >= end:
                continue
            values[first - own.start : end - own.start] = self._read_piece(
                file, make_tensor_name(own.name, start, key), first - start, end - start
            )
            missing -= end - first
        if missing:
            raise OneLLMError(
                f"checkpoint {self._folder} lacks {missing} elements of {own.name} ({key})",
                "it cannot be resumed.",
                "give another checkpoint directory.",
            )
        return values

    def _read_piece(self, file: str, name: str, first: int, end: int) -> torch.Tensor:
        """[end - first] fp32: a range of a tensor of one file."""
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(
                    safe_open(self._folder / file, framework="pt")
                )
            values: torch.Tensor = self._open[file].get_slice(name)[first:end]
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise self._make_error(f"{file} cannot be read: {error}") from error
        if values.dtype != torch.float32 or values.shape != (end - first,):
            raise self._make_error(
                f"{file} has {name} as {tuple(values.shape)} {values.dtype} in {first}..{end}"
            )
        return values

    def _make_error(self, how: str) -> OneLLMError:
        return OneLLMError(
            f"checkpoint {self._folder}: {how}",
            "it cannot be resumed.",
            "give another checkpoint directory.",
        )
