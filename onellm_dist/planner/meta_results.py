"""Results of operations on the meta device, computed once for all calls with the same shapes.

torch computes most shapes on the meta device in Python, some 0.3 ms an operation. A model repeats
its blocks, so most operations have run before with the same arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

_LIMIT = 100_000
"""Remembered results; then all are forgotten."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_UNKNOWN = object()
"""Stands for arguments whose values decide: tensors that are on another device."""


class _Shape(NamedTuple):
    """A tensor on the meta device."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Results(NamedTuple):
    """Several tensors."""

    kind: type[list[torch.Tensor]] | type[tuple[torch.Tensor, ...]]
    shapes: list[_Shape]


class MetaResults:
    """Runs operations, and remembers the shapes of their results.

    Only operations that make new tensors are remembered: neither views nor those that write into
    their arguments, nor any with a tensor on another device.
    """

    def __init__(self) -> None:
        self._known: dict[Any, _Results | _Shape | None] = {}

    def forget(self) -> None:
        """Free what is remembered."""
        self._known.clear()

    def run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return what `func(*args, **kwargs)` returns: tensors without values, with new storages.

        Args:
            func: an ATen operation.
            args: its arguments.
            kwargs: its arguments by name.
        """
        if func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        key = _make_key(args), _make_key(tuple(sorted(kwargs.items())))
        if _UNKNOWN in key:
            return func(*args, **kwargs)
        if (func, key) not in self._known:
            out = func(*args, **kwargs)
            if len(self._known) >= _LIMIT:
                self._known.clear()
            self._known[func, key] = _describe(out, _list_storages((args, *kwargs.values())))
            return out
        known = self._known[func, key]
        if known is None:
            return func(*args, **kwargs)
        if isinstance(known, _Shape):
            return _make(known)
        return known.kind(_make(each) for each in known.shapes)


def _make_key(value: Any) -> Any:
    """Arguments as a hashable value, which is the same for tensors of the same shape."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta or type(value) not in _PLAIN:
            return _UNKNOWN
        return _Shape(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        found = tuple(map(_make_key, value))
        return _UNKNOWN if _UNKNOWN in found else found
    try:
        hash(value)
    except TypeError:
        return _UNKNOWN
    return type(value), value


def _list_storages(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage()._cdata}
    if isinstance(value, list | tuple):
        return set().union(*map(_list_storages, value))
    return set()


def _describe(out: Any, storages: set[int]) -> _Results | _Shape | None:
    """The shapes of a result; None if it must be computed each time."""
    if isinstance(out, torch.Tensor):
        return _describe_tensor(out, storages)
    if not isinstance(out, list | tuple) or not all(isinstance(x, torch.Tensor) for x in out):
        return None
    found = [shape for each in out if (shape := _describe_tensor(each, storages)) is not None]
    if len(found) < len(out) or len(set().union(*map(_list_storages, out))) < len(out):
        return None
    return _Results(list if isinstance(out, list) else tuple, found)


def _describe_tensor(tensor: torch.Tensor, storages: set[int]) -> _Shape | None:
    is_new = tensor.is_meta and tensor.untyped_storage()._cdata not in storages
    if not is_new or type(tensor) is not torch.Tensor or not _fills_storage(tensor):
        return None
    return _Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _fills_storage(tensor: torch.Tensor) -> bool:
    """Whether a new tensor of this shape has a storage of the same size."""
    made = _make(_Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype))
    same = made.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    return same and not tensor.storage_offset()


def _make(shape: _Shape) -> torch.Tensor:
    return torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
