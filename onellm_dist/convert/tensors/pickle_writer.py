"""The pickle inside torch.save's files, written without the tensors that it describes."""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from onellm_dist.convert.tensors.lazy import LazyTensor

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


def pickle_state(tensors: Sequence[tuple[str, LazyTensor]]) -> bytes:
    """The description of a state dict whose tensors are contiguous.

    Each tensor has a storage of its own; storages are numbered in order.
    """
    buffer = io.BytesIO()
    _StatePickler(buffer, protocol=2).dump(
        {name: _TensorReference(key, tensor) for key, (name, tensor) in enumerate(tensors)}
    )
    return buffer.getvalue()


class _GlobalName:
    """Pickles as a reference to a name, which need not be imported here."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name


class _StorageReference:
    """Pickles as a persistent id, as torch.save writes storages."""

    def __init__(self, key: int, tensor: LazyTensor) -> None:
        storage = _GlobalName("torch", _STORAGE_NAMES[tensor.dtype])
        self.pid = ("storage", storage, str(key), "cpu", tensor.numel)


class _TensorReference:
    """Pickles as a call that rebuilds the tensor from its storage."""

    def __init__(self, key: int, tensor: LazyTensor) -> None:
        self.storage = _StorageReference(key, tensor)
        self.shape = tensor.shape


_PythonPickler: Any = pickle._Pickler
"""The pickler in Python, which can write a bare GLOBAL; typeshed knows half of it."""


class _StatePickler(_PythonPickler):  # type: ignore[misc]  # a class all the same
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, _StorageReference) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _GlobalName):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _TensorReference):
            strides = tuple(math.prod(obj.shape[i + 1 :]) for i in range(len(obj.shape)))
            self.save(_GlobalName("torch._utils", "_rebuild_tensor_v2"))
            self.save((obj.storage, 0, tuple(obj.shape), strides, False, OrderedDict()))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)
