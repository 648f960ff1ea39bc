"""torch.save's files (.pth, .pt, .bin) without torch.load: no code that a file names is ever run.

Such a file is a zip archive of stored entries (torch 1.6 and later): `<root>/data.pkl` describes
the tensors, `<root>/data/<key>` holds the bytes of each storage. The unpickler here can rebuild
tensors and plain containers and refuses every other name. Storages stay in the file until a tensor
is read. It is written by hand because torch.load reads all storages, and refuses objects that could
be skipped.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.bounded_pickle import LARGEST_PICKLE, BoundedUnpickler
from onellm_dist.common.errors import OneLLMError
from onellm_dist.convert.tensors.archive import Archive, make_read_error
from onellm_dist.convert.tensors.lazy import DataFile, LazyTensor, Tensors

MOST_DIMENSIONS = 64
"""Dimensions of a tensor; torch has the same limit."""

MOST_REPEATED = 1 << 20
"""Elements of the largest tensor that has more of them than its storage (`expand`)."""

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    file: DataFile
    offset: int
    dtype: torch.dtype
    numel: int


class InertObject:
    """Placeholder for an object of a class that is not loaded.

    It keeps the state it was given and can do nothing.

    Args:
        args: arguments of the constructor, kept.
        kwargs: dropped.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Drop an item of a mapping."""

    def append(self, value: Any) -> None:
        """Drop an item of a list."""


def read_pickled(
    path: Path, *, inert: Sequence[str] = (), offset: int = 0, length: int | None = None
) -> Any:
    """What torch.save wrote, with LazyTensor in place of tensors.

    Args:
        path: the file.
        inert: beginnings of names (`deepspeed.`) whose objects are replaced by `InertObject`; any
            other unknown name is refused.
        offset: first byte of the archive in the file.
        length: bytes of the archive; default: up to the end of the file.

    Raises:
        UsageError: not such a file, cut short, or it names code.
    """

    def read() -> Any:
        data = DataFile(path)
        archive = Archive(data, offset, data.size - offset if length is None else length)
        return _Unpickler(archive.read_entry("data.pkl"), path, tuple(inert), archive).load()

    return _read_safely(path, read)


def read_bare_pickle(path: Path, *, inert: Sequence[str] = ()) -> Any:
    """A pickle outside an archive, without tensors (the metadata of torch.distributed.checkpoint).

    Args:
        path: the file.
        inert: beginnings of names whose objects are replaced by `InertObject`.

    Raises:
        UsageError: not such a file, or it names code.
    """

    def read() -> Any:
        data = DataFile(path)
        if data.size > LARGEST_PICKLE:
            raise make_read_error(path, f"it has {data.size} bytes")
        content = bytes(data.read_bytes(0, data.size).numpy())
        return _Unpickler(content, path, tuple(inert), None).load()

    return _read_safely(path, read)


def _read_safely(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OneLLMError:
        raise
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, struct.error) as error:
        raise make_read_error(path, error) from None
    except Exception as error:  # broken pickles raise nearly anything; none of their code is run
        raise make_read_error(path, f"its description is not a list of tensors ({error})") from None


def get_state_dict(tree: Any, path: Path) -> Tensors:
    """The mapping of names to tensors in what a file holds.

    In training checkpoints it stands inside `model`, `state_dict` or `module`.

    Args:
        tree: content of the file.
        path: the file, for the error.

    Raises:
        UsageError: there is no such mapping.
    """
    for key in ("model", "state_dict", "module"):
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    if (
        not isinstance(tree, Mapping)
        or not tree
        or not all(isinstance(v, LazyTensor) for v in tree.values())
        or not all(isinstance(key, str) for key in tree)
    ):
        raise make_read_error(path, "it has no mapping of names to tensors")
    return dict(tree)


def get_torchscript_state(tree: Any) -> Tensors:
    """Names and tensors of a TorchScript archive, as OpenAI's CLIP files are; empty for others.

    Args:
        tree: content of the file, read with `inert=("__torch__.",)`.
    """
    found: Tensors = {}
    opened: set[int] = set()
    waiting: list[tuple[Any, str]] = [(tree, "")]
    while waiting:
        node, prefix = waiting.pop()
        if isinstance(node, LazyTensor):
            found[prefix] = node
        elif isinstance(node, InertObject) and id(node) not in opened:
            opened.add(id(node))
            state = getattr(node, "state", None)
            children = list(state.items()) if isinstance(state, Mapping) else []
            waiting += [(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in reversed(children)]
    return found


class _Unpickler(BoundedUnpickler):
    buildable = (InertObject, OrderedDict)

    def __init__(
        self, content: bytes, path: Path, inert: tuple[str, ...], archive: Archive | None
    ) -> None:
        super().__init__(content)
        self._path = path
        self._inert = inert
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _BUILDERS:
            return _BUILDERS[full]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full.startswith(self._inert):
            return InertObject
        raise make_read_error(
            self._path, f"it asks for {full}, which is not a tensor: it may run code"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid
        if (
            self._archive is None
            or kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or not isinstance(numel, int)
        ):
            raise make_read_error(self._path, f"an unknown kind of storage: {kind!r}")
        offset, length = self._archive.find(f"data/{key}")
        if length < numel * dtype.itemsize:
            raise make_read_error(
                self._path, f"storage {key} has {length} bytes for {numel} elements of {dtype}"
            )
        return _Storage(self._archive.data, offset, dtype, numel)


def _build_tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> LazyTensor:
    if len(shape) > MOST_DIMENSIONS or len(shape) != len(strides):
        raise ValueError(f"a tensor of {len(shape)} dimensions and {len(strides)} strides")
    if not isinstance(storage, _Storage) or not all(
        type(n) is int and n >= 0 for n in (start, *shape, *strides)
    ):
        raise ValueError("a tensor without a storage")
    shape, strides = tuple(shape), tuple(strides)
    span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if start + span > storage.numel:
        raise ValueError("a tensor goes beyond its storage")
    if math.prod(shape) > max(storage.numel, MOST_REPEATED):
        raise ValueError("a large tensor repeats the values of a small storage")
    offset = storage.offset + start * storage.dtype.itemsize
    if _is_contiguous(shape, strides):
        return storage.file.tensor(offset, shape, storage.dtype)
    span_values = storage.file.tensor(offset, (span,), storage.dtype)
    return LazyTensor(shape, storage.dtype, lambda: span_values.read().as_strided(shape, strides))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(
        n <= 1 or s == math.prod(shape[i + 1 :])
        for i, (n, s) in enumerate(zip(shape, strides, strict=True))
    )


def _build_parameter(data: LazyTensor, *_: Any) -> LazyTensor:
    return data


def _build_size(values: Any = ()) -> tuple[int, ...]:
    if len(values) > MOST_DIMENSIONS:
        raise ValueError(f"a size of {len(values)} dimensions")
    return tuple(values)


def _build_mapping() -> OrderedDict[Any, Any]:
    """An OrderedDict as Python 3 pickles it: its items come afterwards."""
    return OrderedDict()


_BUILDERS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _build_tensor,
    "torch._utils._rebuild_tensor": _build_tensor,
    "torch._utils._rebuild_parameter": _build_parameter,
    "torch._utils._rebuild_parameter_with_state": _build_parameter,
    "collections.OrderedDict": _build_mapping,
    "torch.Size": _build_size,
}
