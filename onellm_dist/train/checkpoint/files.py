"""The files of a checkpoint: written and hashed in one pass, verified in bounded memory, the work dealt over the ranks.

The format is safetensors' (an eight-byte length, a JSON header, the tensors one behind the other). It is written here and not by the
library so that each byte is hashed on its way to the disk, in chunks during which a thread that trains goes on.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from onellm_dist.common.files import sync
from onellm_dist.train.distributed import Distributed

CHUNK = 8 << 20
"""Bytes written or read at a time."""
ALIGN = 8


class Written(NamedTuple):
    """A file on the disk."""

    size: int
    sha256: str


class AbandonedError(Exception):
    """The write was given up: another rank failed."""


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], abandon: threading.Event | None = None
) -> Written:
    """Write fp32 tensors as a safetensors file and force it to the disk.

    Args:
        tensors: name -> [n] fp32, contiguous; those on a GPU come to the host one at a time.
        abandon: looked at between chunks.

    Raises:
        OSError: a full disk, or one that went away.
        AbandonedError: `abandon` was set.
    """
    header: dict[str, object] = {}
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, not fp32")
        end = at + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(len(text) + 8) % ALIGN)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as out:
        for data in (
            memoryview(len(text).to_bytes(8, "little") + text),
            *(_bytes_of(t) for t in tensors.values() if t.numel()),
        ):
            for start in range(0, len(data), CHUNK):
                if abandon is not None and abandon.is_set():
                    raise AbandonedError
                piece = data[start : start + CHUNK]
                out.write(piece)
                digest.update(piece)
                size += len(piece)
    sync(path)
    return Written(size, digest.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.cpu().contiguous().numpy().data.cast("B")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def damaged(expected: Sequence[tuple[Path, Written]], dist: Distributed) -> list[str]:
    """What is wrong with files, each read once by one of the ranks. Called by all ranks; the same answer on each.

    At the world size that wrote a checkpoint, rank r reads the file of rank r, which is the one it loads afterwards.
    """
    found = [_problem(path, right) for path, right in expected[dist.rank :: dist.world_size]]
    return sorted(problem for part in dist.gather([p for p in found if p]) for problem in part)


def _problem(path: Path, right: Written) -> str:
    try:
        size = path.stat().st_size
        if size != right.size:
            return f"{path.name} has {size} of {right.size} bytes"
        digest = sha256_of(path)
    except OSError as error:
        return f"{path.name}: {error}"
    return (
        ""
        if digest == right.sha256
        else f"{path.name} has sha256 {digest[:16]}..., the manifest says {right.sha256[:16]}..."
    )
