"""Files of tensors, written in one pass: the header is known before the first tensor is read.

Safetensors for everything of ours and of transformers; torch.save's zip for the reference and Meta (its loader wants one).
Each byte is scanned for NaN, hashed and written once; a file is on the disk (fsync) before its hash is given.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.convert.tensors.lazy import LazyTensor, finite
from onellm_dist.convert.tensors.safetensors_files import DTYPES

Named = tuple[tuple[str, LazyTensor], ...]
Told = Callable[[int], None]
"""Called with the number of bytes that were just written."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_STORAGE_NAMES = {
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.float64: "DoubleStorage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}
ALIGNMENT = 64
"""Of storages in a zip, as torch.save does since 2.0: they can be memory-mapped."""


@dataclass(frozen=True)
class TensorFile:
    """A file to write: its name in the output folder (the suffix tells the format) and its tensors in order."""

    name: str
    tensors: Named

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors (the header comes on top)."""
        return sum(tensor.nbytes for _, tensor in self.tensors)


@dataclass(frozen=True)
class Written:
    """What a written file is."""

    bytes: int
    sha256: str


def write_tensor_file(
    path: Path, file: TensorFile, *, told: Told, allow_nonfinite: Callable[[str], bool]
) -> Written:
    """Write one file; `path` must not be anybody's final name yet.

    Args:
        allow_nonfinite: whether a tensor of this name may hold NaN or infinity.

    Raises:
        OneLLMError: a tensor holds NaN or infinity.
        OSError: the disk is full, or fails.
    """
    with path.open("wb", buffering=0) as raw:
        sink = _Sink(raw, told)
        if path.suffix == ".safetensors":
            _write_safetensors(sink, file.tensors, allow_nonfinite)
        else:
            _write_zip(sink, path.stem, file.tensors, allow_nonfinite)
        os.fsync(raw.fileno())
    return Written(sink.length, sink.digest.hexdigest())


class _Sink(io.RawIOBase):
    """Hashes and writes; cannot seek, so that the zip writer puts sizes and checksums behind each entry."""

    def __init__(self, raw: Any, told: Told) -> None:
        self._raw, self._told = raw, told
        self.digest, self.length = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        done = 0
        while done < len(view):
            done += self._raw.write(view[done:])
        self.length += len(view)
        self._told(len(view))
        return len(view)


def _checked_blocks(
    sink: Any, name: str, tensor: LazyTensor, allow_nonfinite: Callable[[str], bool]
) -> None:
    written = 0
    for block in tensor.blocks():
        if not finite(block, tensor.dtype) and not allow_nonfinite(name):
            raise OneLLMError(
                f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} holds NaN or infinity",
                "a model with it computes nothing.",
                f"take another checkpoint; or a wider --dtype, where the cast made it; or allow it: --allow '{name}'.",
            )
        sink.write(block.numpy())
        written += len(block)
    if written != tensor.nbytes:
        raise OneLLMError(
            f"{name}: {written} bytes came for {tensor.nbytes}",
            "the file would be spoilt.",
            "report this.",
        )


# -- safetensors --------------------------------------------------------------------------------------------------------


def _write_safetensors(sink: _Sink, tensors: Named, allow_nonfinite: Callable[[str], bool]) -> None:
    sink.write(safetensors_header(tensors))
    for name, tensor in tensors:
        _checked_blocks(sink, name, tensor, allow_nonfinite)


def safetensors_header(tensors: Named) -> bytes:
    """Length and JSON of the header, padded to 8 bytes; data lies in the order given."""
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


def safetensor_shards(
    tensors: Sequence[tuple[str, LazyTensor]], shard_bytes: int, stem: str = "model"
) -> tuple[TensorFile, ...]:
    """Tensors in files of at most `shard_bytes` (a larger tensor has one alone), named as transformers names them.

    Within a file wide elements come first, so that every tensor is aligned.
    """
    shards: list[list[tuple[str, LazyTensor]]] = [[]]
    held = 0
    for name, tensor in tensors:
        if shards[-1] and held + tensor.nbytes > shard_bytes:
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
    """`<stem>.safetensors.index.json`, where there is more than one file."""
    if len(files) < 2:
        return
    places = {name: file.name for file in files for name, _ in file.tensors}
    total = {
        "total_size": sum(f.nbytes for f in files),
        "total_parameters": sum(t.numel for f in files for _, t in f.tensors),
    }
    text = json.dumps({"metadata": total, "weight_map": dict(sorted(places.items()))}, indent=2)
    (folder / f"{stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


# -- torch.save's zip -----------------------------------------------------------------------------------------------------


def _write_zip(
    sink: _Sink, root: str, tensors: Named, allow_nonfinite: Callable[[str], bool]
) -> None:
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[arg-type]
        _entry(archive, sink, f"{root}/data.pkl", pickled_state(tensors))
        _entry(archive, sink, f"{root}/byteorder", b"little")
        for key, (name, tensor) in enumerate(tensors):
            with archive.open(
                _entry_info(sink, f"{root}/data/{key}"), "w", force_zip64=True
            ) as entry:
                _checked_blocks(entry, name, tensor, allow_nonfinite)
        _entry(archive, sink, f"{root}/version", b"3\n")


def _entry(archive: zipfile.ZipFile, sink: _Sink, name: str, content: bytes) -> None:
    with archive.open(_entry_info(sink, name), "w", force_zip64=True) as entry:
        entry.write(content)


def _entry_info(sink: _Sink, name: str) -> zipfile.ZipInfo:
    """An entry whose bytes begin at a multiple of ALIGNMENT: its extra field is padded."""
    info = zipfile.ZipInfo(name)
    zip64_extra = 20
    begin = sink.length + 30 + len(name.encode()) + zip64_extra
    padding = (-begin - 4) % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


class _StorageRef:
    def __init__(self, key: int, tensor: LazyTensor) -> None:
        self.pid = (
            "storage",
            _Global("torch", _STORAGE_NAMES[tensor.dtype]),
            str(key),
            "cpu",
            tensor.numel,
        )


class _Global:
    """Pickles as a reference to a name, which need not be loaded here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _TensorRef:
    def __init__(self, key: int, tensor: LazyTensor) -> None:
        self.storage, self.shape = _StorageRef(key, tensor), tensor.shape


_PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]


class _Pickler(_PythonPickler):  # the one in Python: it can write a bare GLOBAL
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, _StorageRef) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _TensorRef):
            strides = tuple(math.prod(obj.shape[i + 1 :]) for i in range(len(obj.shape)))
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.save((obj.storage, 0, tuple(obj.shape), strides, False, OrderedDict()))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def pickled_state(tensors: Named) -> bytes:
    """The description of a state dict whose tensors are contiguous and have a storage each, numbered in order."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(
        {name: _TensorRef(key, tensor) for key, (name, tensor) in enumerate(tensors)}
    )
    return buffer.getvalue()
