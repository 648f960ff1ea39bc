"""Safetensors files, and folders that hold a state dict in several files, read tensor by tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.convert.tensors.archive import make_read_error
from onellm_dist.convert.tensors.file_kinds import looks_like_safetensors
from onellm_dist.convert.tensors.lazy import DataFile, LazyTensor, Tensors
from onellm_dist.convert.tensors.pickled import get_state_dict, read_pickled

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MOST_DIMENSIONS = 64
LARGEST_HEADER = 24 << 20
"""Bytes of the largest header that is read: 180,000 tensors. As JSON values they take 40 times
that; the safetensors library allows 100 MB."""


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, in the order in which they lie in it.

    Raises:
        UsageError: not a safetensors file, or cut short.
    """
    try:
        data = DataFile(path)
        header, start = _read_header(data)
        entries = sorted(
            ((k, v) for k, v in header.items() if k != "__metadata__"),
            key=lambda item: item[1]["data_offsets"],
        )
        tensors = {name: _open_tensor(data, start, name, entry) for name, entry in entries}
        _check_covered(data, start, [entry["data_offsets"] for _, entry in entries])
    except OneLLMError:
        raise
    except OSError as error:
        raise make_read_error(path, error) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"its header is not a safetensors header ({error})"
        raise make_read_error(path, reason) from None
    return tensors


def _read_header(data: DataFile) -> tuple[dict[str, Any], int]:
    """(content of the header, offset of the first byte behind it)."""
    if data.size < 8:
        raise make_read_error(data.path, f"it has {data.size} bytes")
    (length,) = struct.unpack("<Q", bytes(data.read_bytes(0, 8).numpy()))
    if length > LARGEST_HEADER or 8 + length > data.size:
        raise make_read_error(
            data.path, f"its header should have {length} bytes, the file has {data.size}"
        )
    text = bytes(data.read_bytes(8, length).numpy())
    return json.loads(text, object_pairs_hook=_refuse_repeated), 8 + length


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _open_tensor(data: DataFile, start: int, name: str, entry: dict[str, Any]) -> LazyTensor:
    first, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise make_read_error(
            data.path, f"{name} is stored as {entry['dtype']}, which is not a plain number format"
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if len(shape) > MOST_DIMENSIONS or not all(
        type(n) is int and n >= 0 for n in (first, end, *shape)
    ):
        raise ValueError(f"{name}: shape {list(shape)[:8]}, bytes {first} to {end}")
    if end - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {end - first} bytes for {list(shape)} of {entry['dtype']}")
    if start + end > data.size:
        raise make_read_error(
            data.path,
            f"{name} ends at byte {start + end}, the file has {data.size}: it is cut short",
        )
    return data.tensor(start + first, shape, dtype)


def _check_covered(data: DataFile, start: int, ranges: list[list[int]]) -> None:
    """Check that tensors lie end to end: a changed digit would give one another's bytes."""
    at = 0
    for first, end in ranges:
        if first != at:
            raise ValueError(f"a tensor begins at byte {first}, the last one ended at {at}")
        at = end
    if start + at != data.size:
        raise ValueError(f"the tensors end at byte {start + at}, the file has {data.size}")


def read_state_file(path: Path) -> Tensors:
    """The state dict in one file, .safetensors or torch.save's.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"no checkpoint {path}", "there is nothing to convert.", "check the path.")
    if path.suffix == ".safetensors" or looks_like_safetensors(path):
        return read_safetensors(path)
    return get_state_dict(read_pickled(path), path)


def read_folder(
    folder: Path, stems: Sequence[str] = ("model", "pytorch_model")
) -> tuple[Tensors, tuple[Path, ...]]:
    """The state dict of a transformers directory, in one file or in several with an index.

    Args:
        folder: the directory.
        stems: names that its files may begin with; the first that exists is read.

    Returns:
        (tensors, the files that they come from).

    Raises:
        UsageError: there is no such file, or a file that the index names is missing or lacks a
            tensor.
    """
    for stem in stems:
        for suffix in ("safetensors", "bin", "pt"):
            single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
            if index.is_file():
                return _read_indexed(folder, index)
            if single.is_file():
                return read_state_file(single), (single,)
    raise UsageError(
        f"no weights in {folder}",
        "there is nothing to convert.",
        f"it should have {stems[0]}.safetensors, its index, or a .bin file.",
    )


def _read_indexed(folder: Path, index: Path) -> tuple[Tensors, tuple[Path, ...]]:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise make_read_error(index, error) from None
    absent = [name for name in names if not (folder / name).is_file() or Path(name).name != name]
    if absent:
        raise UsageError(
            f"{folder}: {len(absent)} of {len(names)} files are missing: {', '.join(absent)}",
            f"{index.name} names them, and their tensors would be lost.",
            "download or copy them again.",
        )
    tensors: Tensors = {}
    for name in names:
        tensors |= read_state_file(folder / name)
    if lacking := sorted(set(places) - set(tensors)):
        raise UsageError(
            f"{folder}: {len(lacking)} tensors of {index.name} are in no file: "
            f"{', '.join(lacking[:10])}",
            "the model would be partly random.",
            "download the directory again.",
        )
    return tensors, tuple(folder / name for name in names)
