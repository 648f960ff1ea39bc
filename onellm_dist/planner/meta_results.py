"""Results of operations on the meta device, computed once for all calls with the same shapes.

torch computes most shapes on the meta device in Python, some 0.3 ms an operation. A model repeats
its blocks, so most operations have run before with the same arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class MetaResults:
    """Runs operations, and remembers the shapes of their results.

    Only operations that make new tensors are remembered: neither views nor those that write into
    their arguments, nor any with a tensor on another device.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Sequence[_Shape] | _Shape | None] = {}

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
        known = self._known.get((func, key), _UNKNOWN)
        if known is _UNKNOWN:
            out = func(*args, **kwargs)
            if len(self._known) >= _LIMIT:
                self._known.clear()
            self._known[func, key] = _describe(out, _list_storages((args, *kwargs.values())))
            return out
        if known is None:
            return func(*args, **kwargs)
        if isinstance(known, _Shape):
            return _make(known)
        return type(known)(map(_make, known))


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


def _describe(out: Any, storages: set[int]) -> Sequence[_Shape] | _Shape | None:
    """The shapes of a result; None if it must be computed each time."""
    if isinstance(out, torch.Tensor):
        is_new = out.is_meta and out.untyped_storage()._cdata not in storages
        is_whole = is_new and type(out) is torch.Tensor and _fills_storage(out)
        return _Shape(tuple(out.shape), out.stride(), out.dtype) if is_whole else None
    if type(out) not in (list, tuple):
        return None
    found = [_describe(each, storages) for each in out]
    owners = {each.untyped_storage()._cdata for each in out if isinstance(each, torch.Tensor)}
    if len(owners) < len(out) or not all(isinstance(each, _Shape) for each in found):
        return None
    return type(out)(found)


def _fills_storage(tensor: torch.Tensor) -> bool:
    """Whether a new tensor of this shape has a storage of the same size."""
    made = _make(_Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype))
    same = made.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    return same and not tensor.storage_offset()


def _make(shape: _Shape) -> torch.Tensor:
    return torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
