"""torch.distributed.checkpoint directories (FSDP runs of other programs; torch 2.15's layout): `.metadata` and `.distcp` files, in.

Our own runs write another layout, whatever their engine (elastic.py, which this format hands them to).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import Opened, Options
from onellm_dist.convert.formats import training_run as elastic
from onellm_dist.convert.overlay import overlaid
from onellm_dist.convert.tensors.lazy import LazyTensor
from onellm_dist.convert.tensors.pickled import Inert, read_bare_pickle, read_pickled, unreadable

NAME = "fsdp"
METADATA = ".metadata"
INERT = ("torch.", "pathlib.", "collections.")
_SKIPPED = ("optim", "optimizer")
"""First components of names that are no weights."""


def recognise(path: Path) -> bool:
    """A folder with `.metadata`."""
    return (path / METADATA).is_file()


def open_checkpoint(path: Path, options: Options) -> Opened:
    """Open the folder `path`; `--base` gives config and frozen weights.

    Raises:
        UsageError: not such a folder, or a file is missing.
    """
    if elastic.recognise(path):
        return elastic.open_checkpoint(path, options)
    if not recognise(path):
        raise UsageError(
            f"no {METADATA} in {path}",
            "it says where each tensor lies.",
            "give a torch.distributed.checkpoint directory.",
        )
    metadata = read_bare_pickle(path / METADATA, inert=INERT)
    try:
        chunks = _chunks(metadata.state["storage_data"])
        sizes = {
            name: tuple(entry.state["size"])
            for name, entry in metadata.state["state_dict_metadata"].items()
            if isinstance(entry, Inert)
            and "chunks" in getattr(entry, "state", {})
            and name.split(".")[0] not in _SKIPPED
        }
        files = sorted({path / file for name in sizes for _, file, _, _ in chunks[name]})
    except (AttributeError, KeyError, TypeError) as error:
        raise unreadable(
            path / METADATA, f"it is laid out otherwise than torch 2.15 does ({error})"
        ) from None
    if absent := [file.name for file in files if not file.is_file()]:
        raise UsageError(
            f"{path}: {len(absent)} files are missing: {', '.join(absent)}",
            "they hold parts of weights.",
            "copy all of them.",
        )
    tensors = {name: _tensor(path, name, shape, chunks[name]) for name, shape in sizes.items()}
    return overlaid(NAME, path, tensors, tuple(files), options, {"files": len(files)})


Chunk = tuple[tuple[int, ...], str, int, int]
"""(offset of its first element by dimension, file, byte offset, bytes)."""


def _chunks(storage: dict[Any, Any]) -> dict[str, list[Chunk]]:
    found: dict[str, list[Chunk]] = defaultdict(list)
    for index, info in storage.items():
        where, place = index.state, info.state
        found[where["fqn"]].append(
            (
                tuple(where.get("offset") or ()),
                str(place["relative_path"]),
                int(place["offset"]),
                int(place["length"]),
            )
        )
    return found


def _tensor(folder: Path, name: str, shape: tuple[int, ...], chunks: list[Chunk]) -> LazyTensor:
    """A tensor of its chunks, which must cover it exactly."""
    parts: list[tuple[tuple[int, ...], LazyTensor]] = []
    for offset, file, at, length in chunks:
        part = read_pickled(folder / file, offset=at, length=length)
        if not isinstance(part, LazyTensor):
            raise unreadable(folder / file, f"{name} is no tensor there")
        parts.append((offset or (0,) * len(shape), part))
    covered = sum(part.numel for _, part in parts)
    inside = all(
        all(o + n <= s for o, n, s in zip(offset, part.shape, shape, strict=True))
        for offset, part in parts
    )
    if not inside or covered != torch.Size(shape).numel() or _overlap(parts):
        raise unreadable(
            folder / METADATA, f"the chunks of {name} {list(shape)} do not cover it once"
        )
    if len(parts) == 1:
        return parts[0][1].reshaped(shape)
    dtype = parts[0][1].dtype

    def load() -> torch.Tensor:
        whole = torch.empty(shape, dtype=dtype)
        for offset, part in parts:
            whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = (
                part.read()
            )
        return whole

    return LazyTensor(shape, dtype, load)


def _overlap(parts: list[tuple[tuple[int, ...], LazyTensor]]) -> bool:
    def meet(a: tuple[tuple[int, ...], LazyTensor], b: tuple[tuple[int, ...], LazyTensor]) -> bool:
        return all(
            x < y + m and y < x + n
            for x, n, y, m in zip(a[0], a[1].shape, b[0], b[1].shape, strict=True)
        )

    return any(meet(a, b) for a, b in itertools.combinations(parts, 2))
