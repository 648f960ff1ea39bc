"""Files of tensors, written in one pass: the header is known before the first tensor is read.

Our own directories and transformers' are safetensors; the reference and Meta need torch.save's zip.
Each byte is scanned for NaN, hashed and written once. A file is on the disk (fsync) before its hash
is given.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError
from onellm_dist.convert.tensors.lazy import LazyTensor, is_finite
from onellm_dist.convert.tensors.pickle_writer import pickle_state
from onellm_dist.convert.tensors.safetensors_files import DTYPES

NamedTensors = tuple[tuple[str, LazyTensor], ...]
OnBytes = Callable[[int], None]
"""Called with the number of bytes that were just processed."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNMENT = 64
"""Alignment of storages in a zip, as torch.save has since 2.0: they can be memory-mapped."""


@dataclass(frozen=True)
class TensorFile:
    """A file to write.

    Attributes:
        name: its name in the output folder; the suffix chooses the format.
        tensors: its tensors, in order.
    """

    name: str
    tensors: NamedTensors

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; the header comes on top."""
        return sum(tensor.nbytes for _, tensor in self.tensors)


@dataclass(frozen=True)
class FileDigest:
    """Size and hash of a file that was written.

    Attributes:
        bytes: its size.
        sha256: its SHA-256, in hex.
    """

    bytes: int
    sha256: str


def write_tensor_file(
    path: Path, file: TensorFile, *, on_bytes: OnBytes, allow_nonfinite: Callable[[str], bool]
) -> FileDigest:
    """Write one file in a staging folder.

    Args:
        path: where to write it.
        file: its name and tensors.
        on_bytes: called as bytes are written.
        allow_nonfinite: whether a tensor of this name may hold NaN or infinity.

    Raises:
        OneLLMError: a tensor holds NaN or infinity.
        OSError: the disk is full, or fails.
    """
    with path.open("wb", buffering=0) as raw:
        sink = _HashingWriter(raw, on_bytes)
        if path.suffix == ".safetensors":
            _write_safetensors(sink, file.tensors, allow_nonfinite)
        else:
            _write_zip(sink, path.stem, file.tensors, allow_nonfinite)
        os.fsync(raw.fileno())
    return FileDigest(sink.length, sink.digest.hexdigest())


class _HashingWriter(io.RawIOBase):
    """Hashes and writes. It cannot seek: the zip writer puts sizes and checksums behind entries."""

    def __init__(self, raw: io.RawIOBase, on_bytes: OnBytes) -> None:
        self._raw = raw
        self._on_bytes = on_bytes
        self.digest = hashlib.sha256()
        self.length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        done = 0
        while done < len(view):
            done += self._raw.write(view[done:]) or 0
        self.length += len(view)
        self._on_bytes(len(view))
        return len(view)


def _write_tensor(
    sink: Any, name: str, tensor: LazyTensor, allow_nonfinite: Callable[[str], bool]
) -> None:
    written = 0
    for block in tensor.read_blocks():
        if not is_finite(block, tensor.dtype) and not allow_nonfinite(name):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise OneLLMError(
                f"{name} {list(tensor.shape)} {dtype} holds NaN or infinity",
                "a model with it computes nothing.",
                "use another checkpoint; a wider --dtype, if the cast made it; or allow it: "
                f"--allow '{name}'.",
            )
        sink.write(block.numpy())
        written += len(block)
    if written != tensor.nbytes:
        raise OneLLMError(
            f"{name}: {written} bytes were read for {tensor.nbytes}",
            "the file would be wrong.",
            "report this.",
        )


def _write_safetensors(
    sink: _HashingWriter, tensors: NamedTensors, allow_nonfinite: Callable[[str], bool]
) -> None:
    sink.write(build_safetensors_header(tensors))
    for name, tensor in tensors:
        _write_tensor(sink, name, tensor, allow_nonfinite)


def build_safetensors_header(tensors: NamedTensors) -> bytes:
    """Length and JSON of a safetensors header, padded to 8 bytes; data lies in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def split_into_files(
    tensors: Sequence[tuple[str, LazyTensor]], file_bytes: int, stem: str = "model"
) -> tuple[TensorFile, ...]:
    """Distribute tensors over safetensors files, named as transformers names them.

    Within a file wide elements come first, so that every tensor is aligned.

    Args:
        tensors: names and tensors, in order.
        file_bytes: size of the largest file; a larger tensor has a file of its own.
        stem: beginning of the files' names.
    """
    shards: list[list[tuple[str, LazyTensor]]] = [[]]
    held = 0
    for name, tensor in tensors:
        if shards[-1] and held + tensor.nbytes > file_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, tensor))
        held += tensor.nbytes
    names = (
        [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        if len(shards) > 1
        else [f"{stem}.safetensors"]
    )
    return tuple(
        TensorFile(name, tuple(sorted(shard, key=lambda item: -item[1].dtype.itemsize)))
        for name, shard in zip(names, shards, strict=True)
    )


def write_index(folder: Path, files: Sequence[TensorFile], stem: str = "model") -> None:
    """Write `<stem>.safetensors.index.json` if there is more than one file.

    Args:
        folder: where to write it.
        files: the safetensors files.
        stem: beginning of the files' names.
    """
    if len(files) < 2:
        return
    places = {name: file.name for file in files for name, _ in file.tensors}
    total = {
        "total_size": sum(f.nbytes for f in files),
        "total_parameters": sum(t.numel for f in files for _, t in f.tensors),
    }
    text = json.dumps({"metadata": total, "weight_map": dict(sorted(places.items()))}, indent=2)
    (folder / f"{stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _write_zip(
    sink: _HashingWriter,
    root: str,
    tensors: NamedTensors,
    allow_nonfinite: Callable[[str], bool],
) -> None:
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        _write_entry(archive, sink, f"{root}/data.pkl", pickle_state(tensors))
        _write_entry(archive, sink, f"{root}/byteorder", b"little")
        for key, (name, tensor) in enumerate(tensors):
            info = _build_entry(sink, f"{root}/data/{key}")
            with archive.open(info, "w", force_zip64=True) as entry:
                _write_tensor(entry, name, tensor, allow_nonfinite)
        _write_entry(archive, sink, f"{root}/version", b"3\n")


def _write_entry(archive: zipfile.ZipFile, sink: _HashingWriter, name: str, content: bytes) -> None:
    with archive.open(_build_entry(sink, name), "w", force_zip64=True) as entry:
        entry.write(content)


def _build_entry(sink: _HashingWriter, name: str) -> zipfile.ZipInfo:
    """An entry whose bytes begin at a multiple of ALIGNMENT: its extra field is padded."""
    info = zipfile.ZipInfo(name)
    zip64_extra = 20
    begin = sink.length + 30 + len(name.encode()) + zip64_extra
    padding = (-begin - 4) % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info
