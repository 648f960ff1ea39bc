"""An unpickler that runs no code and cannot be made to take much memory or time.

The standard library's unpickler in C sizes its memory by numbers in the file (nine bytes can ask
for 16 GiB) and ends the interpreter on objects that are nested too deeply. This one is the standard
library's in Python, with bounds. It is slower (about a microsecond per operation), which does not
matter for the descriptions of tensors and the tables of annotations that are read with it.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

LARGEST_PICKLE = 256 << 20
"""Bytes of the largest pickle; the description of a checkpoint of 7B has 0.1 MB, RefCOCO 30 MB."""
MOST_OPERATIONS = 2_000_000
"""Operations of the longest pickle; each makes at most a small object (OneLLM-7B's has 25,000)."""
DEEPEST = 64
"""Containers inside each other; checkpoints have about ten."""
LARGEST_INTEGER = 1 << 128
"""Random states and hashes are that large; sizes are far smaller."""
MOST_TUPLE_KEYS = 4096
"""Tuples as keys of dictionaries: their hashes can be made to collide."""

_pickle: Any = pickle
_PythonUnpickler: Any = _pickle._Unpickler
"""The unpickler in Python; typeshed knows half of it."""
_REFUSED = (
    pickle.BYTEARRAY8,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
)
"""Operations that no file of ours needs; some allocate by a number in the file."""


class BoundedUnpickler(_PythonUnpickler):  # type: ignore[misc]  # a class all the same
    """Unpickles plain values; a subclass may allow names (`find_class`) and storages.

    Args:
        content: the pickle.
        encoding: of the texts of Python 2.
        errors: what happens to texts of Python 2 that are not of that encoding.

    Raises:
        pickle.UnpicklingError: it is too large, or names something.
    """

    buildable: tuple[type, ...] = ()
    """Types whose objects may be given a state."""
    most_operations = MOST_OPERATIONS

    def __init__(self, content: bytes, *, encoding: str = "utf-8", errors: str = "strict") -> None:
        if len(content) > LARGEST_PICKLE:
            raise pickle.UnpicklingError(f"it has {len(content):,} bytes")
        super().__init__(io.BytesIO(content), encoding=encoding, errors=errors)
        self._tuple_keys = 0

    def load(self) -> Any:
        """The value.

        Raises:
            pickle.UnpicklingError: a bound is passed, or a name is not allowed.
            Exception: nearly anything, of a damaged pickle.
        """
        # The library's own loop, with an end.
        self._unframer = _pickle._Unframer(self._file_read, self._file_readline)
        self.read = self._unframer.read
        self.readline = self._unframer.readline
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        read, find = self.read, _OPERATIONS.get
        try:
            for _ in range(self.most_operations):
                find(read(1), _refuse)(self)
        except _pickle._Stop as stop:
            check_shape(stop.value, self.most_operations)
            return stop.value
        raise pickle.UnpicklingError(f"it has more than {self.most_operations:,} operations")

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every name: plain values need none, and code cannot be reached without names."""
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse objects that are stored elsewhere."""
        raise pickle.UnpicklingError("it refers to objects outside of it")

    def check_key(self, key: Any) -> None:
        """Check that a value can be a key without costing more than its size."""
        if isinstance(key, tuple):
            self._tuple_keys += 1
            plain = len(key) <= 16 and not any(isinstance(part, tuple) for part in key)
            if not plain or self._tuple_keys > MOST_TUPLE_KEYS:
                raise pickle.UnpicklingError("its keys are too large or too many")
            for part in key:
                self.check_key(part)
        elif isinstance(key, frozenset) or (
            isinstance(key, int) and not -(1 << 64) < key < 1 << 64
        ):
            raise pickle.UnpicklingError(f"a key is a {type(key).__name__} that is too large")

    def _check_integer(self) -> None:
        if abs(self.stack[-1]) >= LARGEST_INTEGER:
            raise pickle.UnpicklingError("it has a number of more than 128 bits")


def check_shape(value: Any, most: int = MOST_OPERATIONS) -> None:
    """Check that whoever walks through a value comes to an end.

    Args:
        value: lists, tuples, dictionaries and sets, in each other.
        most: items of all of them, those counted again that stand in several places.

    Raises:
        pickle.UnpicklingError: they are nested deeper than DEEPEST, inside themselves, or too many.
    """
    known: dict[int, tuple[int, int]] = {}  # id -> (depth, items)
    opened: set[int] = set()
    path: list[tuple[Any, Iterator[Any]]] = []
    sums: list[tuple[int, int]] = []

    def enter(node: Any) -> None:
        if len(path) >= DEEPEST or id(node) in opened:
            raise pickle.UnpicklingError("its values are nested too deeply")
        opened.add(id(node))
        path.append((node, iter(node.values() if isinstance(node, dict) else node)))
        sums.append((1, len(node)))

    if isinstance(value, _CONTAINERS):
        enter(value)
    while path:
        node, children = path[-1]
        for child in children:
            if not isinstance(child, _CONTAINERS):
                continue
            if id(child) not in known:
                enter(child)
                break
            sums[-1] = _add(sums[-1], known[id(child)], most)
        else:
            path.pop()
            opened.discard(id(node))
            known[id(node)] = own = sums.pop()
            if sums:
                sums[-1] = _add(sums[-1], own, most)


_CONTAINERS = (tuple, list, dict, set, frozenset)


def _add(outer: tuple[int, int], inner: tuple[int, int], most: int) -> tuple[int, int]:
    depth, items = max(outer[0], inner[0] + 1), outer[1] + inner[1]
    if depth > DEEPEST or items > most:
        raise pickle.UnpicklingError("its values are nested too deeply, or too many")
    return depth, items


def _load_setitem(unpickler: Any) -> None:
    unpickler.check_key(unpickler.stack[-2])
    _PythonUnpickler.load_setitem(unpickler)


def _load_setitems(unpickler: Any) -> None:
    for key in unpickler.stack[::2]:
        unpickler.check_key(key)
    _PythonUnpickler.load_setitems(unpickler)


def _load_dict(unpickler: Any) -> None:
    for key in unpickler.stack[::2]:
        unpickler.check_key(key)
    _PythonUnpickler.load_dict(unpickler)


def _load_additems(unpickler: Any) -> None:
    for key in unpickler.stack:
        unpickler.check_key(key)
    _PythonUnpickler.load_additems(unpickler)


def _load_frozenset(unpickler: Any) -> None:
    for key in unpickler.stack:
        unpickler.check_key(key)
    _PythonUnpickler.load_frozenset(unpickler)


def _load_build(unpickler: Any) -> None:
    """Give an object its state; functions and classes have none to be given."""
    if type(unpickler.stack[-2]) not in unpickler.buildable:
        kind = type(unpickler.stack[-2]).__name__
        raise pickle.UnpicklingError(f"it changes an object of type {kind}")
    if type(unpickler.stack[-2]) is OrderedDict:  # state dicts carry versions of their modules
        unpickler.stack.pop()
        return
    _PythonUnpickler.load_build(unpickler)


def _load_integer(name: str) -> Callable[[Any], None]:
    def load(unpickler: Any) -> None:
        getattr(_PythonUnpickler, name)(unpickler)
        unpickler._check_integer()

    return load


def _refuse(unpickler: Any) -> None:
    raise pickle.UnpicklingError("it is cut short, or has an operation that is not allowed")


_OPERATIONS: dict[bytes, Callable[[Any], None]] = {
    **{
        bytes([code]): operation
        for code, operation in _PythonUnpickler.dispatch.items()
        if bytes([code]) not in _REFUSED
    },
    pickle.SETITEM: _load_setitem,
    pickle.SETITEMS: _load_setitems,
    pickle.DICT: _load_dict,
    pickle.ADDITEMS: _load_additems,
    pickle.FROZENSET: _load_frozenset,
    pickle.BUILD: _load_build,
    pickle.INT: _load_integer("load_int"),
    pickle.LONG: _load_integer("load_long"),
    pickle.LONG1: _load_integer("load_long1"),
    pickle.LONG4: _load_integer("load_long4"),
}
