"""torch.distributed.checkpoint directories of other programs (FSDP runs; torch 2.15's layout), in.

Such a directory has `.metadata` and `.distcp` files. Our own runs write another layout, whatever
their engine: `training_run.py` reads it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import (
    ArchiveRange,
    ConversionOptions,
    OpenedCheckpoint,
    TrainedWeights,
)
from onellm_dist.convert.formats import training_run
from onellm_dist.convert.tensors.archive import make_read_error
from onellm_dist.convert.tensors.lazy import LazyTensor
from onellm_dist.convert.tensors.pickled import (
    InertObject,
    read_bare_pickle,
    read_pickled,
)

NAME = "fsdp"
KIND = "onellm"
ORDER = 9
ABOUT = "A torch.distributed.checkpoint directory (or one of our runs')."
EXAMPLE = "run/checkpoint"
DEFAULT_TARGET = "onellm"

METADATA = ".metadata"
INERT = ("torch.", "pathlib.", "collections.")
"""Beginnings of names whose objects in the metadata are skipped, not created."""
_NOT_WEIGHTS = ("optim", "optimizer")
"""First components of names that are not weights."""

_Chunk = tuple[tuple[int, ...], str, int, int]
"""(offset of its first element by dimension, file, byte offset, bytes)."""
_Part = tuple[tuple[int, ...], LazyTensor]
"""(offset of its first element by dimension, tensor)."""


def is_format(path: Path) -> bool:
    """Whether a path is a folder with `.metadata`."""
    return (path / METADATA).is_file()


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint | TrainedWeights:
    """Open the folder `path`.

    Raises:
        UsageError: not such a folder, or a file is missing.
    """
    if training_run.is_format(path):
        return training_run.open_checkpoint(path, options)
    if not is_format(path):
        raise UsageError(
            f"no {METADATA} in {path}",
            "it states where each tensor lies.",
            "give a torch.distributed.checkpoint directory.",
        )
    metadata = read_bare_pickle(path / METADATA, inert=INERT)
    try:
        chunks = _read_chunks(metadata.state["storage_data"])
        sizes = _read_sizes(metadata.state["state_dict_metadata"])
        files = sorted({path / file for name in sizes for _, file, _, _ in chunks[name]})
    except (AttributeError, KeyError, TypeError) as error:
        raise make_read_error(
            path / METADATA, f"its layout is not that of torch 2.15 ({error})"
        ) from None
    if absent := [file.name for file in files if not file.is_file()]:
        raise UsageError(
            f"{path}: {format_count(len(absent), 'file')} missing: {', '.join(absent)}",
            "they hold parts of weights.",
            "copy all of them.",
        )
    tensors = {name: _open_tensor(path, name, shape, chunks[name]) for name, shape in sizes.items()}
    archives = tuple(
        ArchiveRange(path / file, start, length)
        for name in sizes
        for _, file, start, length in chunks[name]
    )
    return TrainedWeights(NAME, tensors, tuple(files), path, {"files": len(files)}, archives)


def _read_sizes(entries: dict[Any, Any]) -> dict[str, tuple[int, ...]]:
    """Name of each weight -> its shape."""
    return {
        name: tuple(entry.state["size"])
        for name, entry in entries.items()
        if isinstance(entry, InertObject)
        and "chunks" in getattr(entry, "state", {})
        and name.split(".")[0] not in _NOT_WEIGHTS
    }


def _read_chunks(storage: dict[Any, Any]) -> dict[str, list[_Chunk]]:
    """Name of each tensor -> the chunks that it is stored in."""
    found: dict[str, list[_Chunk]] = defaultdict(list)
    for index, info in storage.items():
        where, place = index.state, info.state
        offset = tuple(where.get("offset") or ())
        file, start, length = place["relative_path"], place["offset"], place["length"]
        found[where["fqn"]].append((offset, str(file), int(start), int(length)))
    return found


def _open_tensor(
    folder: Path, name: str, shape: tuple[int, ...], chunks: Sequence[_Chunk]
) -> LazyTensor:
    """A tensor of its chunks, which must cover it exactly."""
    parts: list[_Part] = []
    for offset, file, start, length in chunks:
        part = read_pickled(folder / file, offset=start, length=length)
        if not isinstance(part, LazyTensor):
            raise make_read_error(folder / file, f"{name} is not a tensor there")
        parts.append((offset or (0,) * len(shape), part))
    covered = sum(part.numel for _, part in parts)
    inside = all(
        all(o + n <= s for o, n, s in zip(offset, part.shape, shape, strict=True))
        for offset, part in parts
    )
    if not inside or covered != torch.Size(shape).numel() or _has_overlap(parts):
        raise make_read_error(
            folder / METADATA, f"the chunks of {name} {list(shape)} do not cover it once"
        )
    if len(parts) == 1:
        return parts[0][1].reshape(shape)
    dtype = parts[0][1].dtype

    def load() -> torch.Tensor:
        joined = torch.empty(shape, dtype=dtype)
        for offset, part in parts:
            place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
            joined[place] = part.read()
        return joined

    return LazyTensor(shape, dtype, load)


def _has_overlap(parts: Sequence[_Part]) -> bool:
    def overlap(a: _Part, b: _Part) -> bool:
        return all(
            x < y + m and y < x + n
            for x, n, y, m in zip(a[0], a[1].shape, b[0], b[1].shape, strict=True)
        )

    return any(overlap(a, b) for a, b in itertools.combinations(parts, 2))
