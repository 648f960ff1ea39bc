"""The end of a run: the whole model as a `save_pretrained` directory, which the next stage's `model.path` names.

Weights arrive from the engine one by one and go to the disk one by one: rank 0 holds the largest of them, never all.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import sync
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine

MODEL = "model"
FILE_BYTES = 5_000_000_000
"""Largest weights file, as transformers' own default was; a larger tensor gets a file of its own."""
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def export_model(
    folder: Path,
    engine: Engine,
    model: Any,
    processor: Any,
    dist: Distributed,
    beside: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the trained model and its processor to `folder`, whole or not at all. Called by all ranks; rank 0 writes.

    Args:
        model: the transformers model whose weights the engine holds; only its class and config are used.
        beside: name -> text of small files that belong to it (rank 0's count).

    Raises:
        OneLLMError: rank 0 could not write; every rank raises.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    failure = None
    weights = engine.full_weights()
    if dist.is_rank_zero:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_around(partial, model, processor, engine.compute_dtype)
            write_weights(partial, weights, _shapes(engine))
            for name, text in beside.items():
                (partial / name).write_text(text, encoding="utf-8")
            for path in partial.iterdir():
                sync(path)
            _replace(partial, folder)
        except OSError as error:
            failure = str(error)
    for (
        _
    ) in weights:  # the other ranks, and rank 0 after a failure: the collectives go on to the end
        pass
    failure = dist.broadcast(failure)
    if failure is not None:
        raise OneLLMError(
            f"the model could not be written to {folder}: {failure}",
            "the run has no export.",
            "make room, and start the run again.",
        )


def write_weights(
    folder: Path,
    weights: Iterator[tuple[str, torch.Tensor]],
    shapes: Shapes,
    file_bytes: int = FILE_BYTES,
) -> None:
    """`model.safetensors`, or several files with an index, as transformers names them.

    Args:
        weights: each of `shapes`, in the same order; held one at a time.
    """
    files = _files(shapes, file_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        with (folder / file).open("wb") as out:
            _write_header(out, {name: shapes[name] for name in names})
            for wanted in names:
                name, tensor = next(weights)
                if name != wanted or tuple(tensor.shape) != shapes[name][0]:
                    raise RuntimeError(
                        f"the engine gave {name} {list(tensor.shape)} where {wanted} was due"
                    )
                out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(_size(*shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _shapes(engine: Engine) -> Shapes:
    return {name: (tuple(shape), dtype) for name, shape, dtype in engine.full_weight_shapes()}


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _files(shapes: Shapes, file_bytes: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        if files[-1] and used + _size(*shape) > file_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += _size(*shape)
    return files


def _write_header(out: IO[bytes], shapes: Shapes) -> None:
    """The start of a safetensors file: length, JSON of dtypes, shapes and places, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in shapes.items():
        end = at + _size(shape, dtype)
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def _write_around(folder: Path, model: Any, processor: Any, dtype: torch.dtype) -> None:
    """Config, generation config and processor: what `save_pretrained` writes beside the weights."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def restore_export(folder: Path) -> None:
    """Give back its name to an export that was being replaced when a start was killed. Rank 0 calls it."""
    before = _displaced(folder)
    if before.is_dir() and not folder.exists():
        before.rename(folder)


def _displaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


def _replace(partial: Path, folder: Path) -> None:
    """Give `partial` the name `folder`, which another export may have."""
    before = _displaced(folder)
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)
