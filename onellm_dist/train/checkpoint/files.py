"""The files of a checkpoint: written and hashed in one pass, verified in bounded memory.

The format is safetensors' (an eight-byte length, a JSON header, the tensors end to end). It is
written here and not by the library so that each byte is hashed on its way to the disk, in blocks
between which a training thread runs.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from onellm_dist.common.files import sha256_file, sync
from onellm_dist.train.distributed import Distributed

BLOCK_BYTES = 8 << 20
"""Bytes written at a time."""
ALIGNMENT = 8


class FileRecord(NamedTuple):
    """What a manifest records of a file."""

    size: int
    """Bytes."""
    sha256: str
    """Hex digest."""


class AbandonedError(Exception):
    """The write was abandoned because another rank failed."""


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], abandon: threading.Event | None = None
) -> FileRecord:
    """Write fp32 tensors as a safetensors file and force it to the disk.

    Args:
        path: the file.
        tensors: name to contiguous fp32 tensor [n]; those on a GPU come to the host one at a time.
        abandon: checked between blocks.

    Raises:
        OSError: the disk is full, or went away.
        AbandonedError: `abandon` was set.
    """
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, not fp32")
        end = offset + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as out:
        for data in (
            memoryview(len(text).to_bytes(8, "little") + text),
            *(_get_bytes(t) for t in tensors.values() if t.numel()),
        ):
            for start in range(0, len(data), BLOCK_BYTES):
                if abandon is not None and abandon.is_set():
                    raise AbandonedError
                block = data[start : start + BLOCK_BYTES]
                out.write(block)
                digest.update(block)
                size += len(block)
    sync(path)
    return FileRecord(size, digest.hexdigest())


def _get_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.cpu().contiguous().numpy().data.cast("B")


def find_damage(expected: Sequence[tuple[Path, FileRecord]], dist: Distributed) -> list[str]:
    """Describe what is wrong with files; each is read once, by one of the ranks.

    All ranks call it and get the same answer. At the world size that wrote a checkpoint, rank r
    reads the file of rank r, which is the one that it loads afterwards.
    """
    own = [_check_file(path, record) for path, record in expected[dist.rank :: dist.world_size]]
    gathered = dist.gather([problem for problem in own if problem])
    return sorted(problem for problems in gathered for problem in problems)


def _check_file(path: Path, record: FileRecord) -> str:
    """What is wrong with one file; "" if nothing is."""
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{path.name} has {size} of {record.size} bytes"
        digest = sha256_file(path)
    except OSError as error:
        return f"{path.name}: {error}"
    if digest == record.sha256:
        return ""
    return f"{path.name} has sha256 {digest[:16]}..., the manifest says {record.sha256[:16]}..."
