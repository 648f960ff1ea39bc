"""One tensor that torch.save wrote, as an array: no code that the file names is ever run.

torch.load is not used: its unpickler sizes memory by numbers in the file, and it inflates whatever
a compressed entry promises. Here every number is held against the bytes that are there.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from onellm_dist.common.bounded_pickle import BoundedUnpickler

_MOST_ENTRIES = 1000
"""Members of the archive; torch.save writes seven for one tensor."""
_LARGEST_PICKLE = 1 << 20
"""Bytes of the description; one tensor's has 200."""
_MOST_DIMENSIONS = 8
_LOCAL = struct.Struct("<4s22x2H")
_BFLOAT16 = "bfloat16"
_STORAGES: Mapping[str, str] = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "DoubleStorage": "<f8",
    "BFloat16Storage": _BFLOAT16,
    "ByteStorage": "|u1",
    "CharStorage": "|i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "BoolStorage": "|b1",
}
"""torch's name of a storage to NumPy's name of its numbers."""


class _StorageKind(NamedTuple):
    dtype: str

    @property
    def stored(self) -> np.dtype[Any]:
        """The numbers as their bytes are read: NumPy has no bfloat16."""
        return np.dtype("<u2" if self.dtype == _BFLOAT16 else self.dtype)


class _StoredNumbers(NamedTuple):
    kind: _StorageKind
    values: np.ndarray
    """[N], a view of the file's bytes."""


def read_tensor(data: bytes) -> Any:
    """Read what torch.save wrote, with arrays in place of tensors.

    Args:
        data: the file, as torch 1.6 and later write it.

    Returns:
        An array that may be a view of `data` (bfloat16 becomes fp32), or the plain value that was
        saved instead of a tensor.

    Raises:
        Exception: nearly anything, of a file that is damaged, hostile or no such file; the text
            says what is wrong.
    """
    return _ArrayUnpickler(_Archive(data)).load()


class _Archive:
    """The members of the archive, as views of its bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        # Each member of a directory begins with this mark: zipfile makes an object of each.
        if data.count(b"PK\x01\x02") > _MOST_ENTRIES:
            raise ValueError(f"it is an archive of more than {_MOST_ENTRIES:,} members")
        if not data.startswith(b"PK"):
            raise ValueError(
                "it is not an archive of torch.save (torch before 1.6 wrote another format, and "
                "pickles are never loaded): save it again with torch.save"
            )
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
        described = [m.filename for m in members if m.filename.rsplit("/", 1)[-1] == "data.pkl"]
        if len(described) != 1:
            raise ValueError(f"it is an archive with {len(described)} data.pkl, not one")
        root = described[0].removesuffix("data.pkl")
        self._members = {m.filename.removeprefix(root): m for m in members}
        if len(self._members) != len(members):
            raise ValueError("two members of the archive have one name")
        if "byteorder" in self._members and bytes(self.read("byteorder")) != b"little":
            raise ValueError("its numbers are big-endian")

    def read(self, name: str) -> memoryview:
        """The bytes of a member, checked against its CRC-32 (0: the writer left it out)."""
        member = self._members.get(name)
        if member is None:
            raise ValueError(f"it has no member {name}")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"its member {name} is compressed or encrypted")
        header = bytes(self._data[member.header_offset :][: _LOCAL.size])
        magic, name_length, extra_length = _LOCAL.unpack(header)
        start = member.header_offset + _LOCAL.size + name_length + extra_length
        content = self._data[start : start + member.file_size]
        if magic != b"PK\x03\x04" or len(content) != member.file_size:
            raise ValueError(f"its member {name} is cut short or has no header")
        if member.CRC and zlib.crc32(content) != member.CRC:
            raise ValueError(f"its member {name} fails its CRC-32")
        return content


class _ArrayUnpickler(BoundedUnpickler):
    buildable = (OrderedDict,)

    def __init__(self, archive: _Archive) -> None:
        described = archive.read("data.pkl")
        if len(described) > _LARGEST_PICKLE:
            raise ValueError(f"its data.pkl has {len(described):,} bytes")
        super().__init__(bytes(described))
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageKind(_STORAGES[name])
        found = _BUILDERS.get(f"{module}.{name}")
        if found is None:
            raise ValueError(f"it asks for {module}.{name}, which may run code")
        return found

    def persistent_load(self, pid: Any) -> _StoredNumbers:
        mark, kind, key, _, count = pid
        if mark != "storage" or not isinstance(kind, _StorageKind) or type(count) is not int:
            raise ValueError("it has a storage of an unknown kind")
        content = self._archive.read(f"data/{key}")
        size = count * kind.stored.itemsize
        if not 0 <= size <= len(content):
            raise ValueError(
                f"its header says {count:,} numbers of {kind.dtype}, and {len(content):,} bytes "
                "follow"
            )
        return _StoredNumbers(kind, np.frombuffer(content[:size], kind.stored))


def _build_array(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    numbers = (start, *shape, *strides)
    if (
        not isinstance(storage, _StoredNumbers)
        or len(shape) != len(strides)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
    ):
        raise ValueError("it has a tensor without a storage or a shape")
    values, count = storage.values, math.prod(shape)
    if not count:
        return np.empty(shape, np.float32 if storage.kind.dtype == _BFLOAT16 else values.dtype)
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if start + span > len(values) or count > len(values):
        raise ValueError(
            f"a tensor of shape {tuple(shape)} does not lie in its {len(values):,} numbers"
        )
    size = values.itemsize
    view = np.lib.stride_tricks.as_strided(
        values[start : start + span], tuple(shape), [s * size for s in strides], writeable=False
    )
    if storage.kind.dtype == _BFLOAT16:
        return (np.atleast_1d(view).astype(np.uint32) << 16).view(np.float32).reshape(view.shape)
    return view


def _build_parameter(array: Any, *_: Any) -> Any:
    return array


def _build_mapping() -> OrderedDict[Any, Any]:
    return OrderedDict()


_BUILDERS: Mapping[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _build_array,
    "torch._utils._rebuild_parameter": _build_parameter,
    "collections.OrderedDict": _build_mapping,
}
