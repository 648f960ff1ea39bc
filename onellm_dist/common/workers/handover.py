"""Passing objects with tensors between processes, through memory that no file system limits.

Each message is a datagram on a Unix socket that carries one file descriptor of anonymous memory
(`memfd_create`). Unlike the queues of torch, it needs no room in `/dev/shm` and no file in `TMPDIR`
(docker gives containers 64 MiB of `/dev/shm`), and an error reaches the process that sends.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

import torch

_HEADER = struct.Struct("<QQ")
"""Offset of the pickle in the memory, and bytes in all."""
_ALIGNMENT = 64
_SMALL_BYTES = 1 << 20
"""A tensor of up to so many bytes is copied on receipt: it may be kept for long, and would keep
the whole message and its file descriptor."""
_MOST_BYTES = 1 << 30
"""Bytes of one write: Linux takes at most 2 GiB."""


def make_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets for `send` and `receive`."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(connection: socket.socket, value: Any) -> None:
    """Send a picklable object; the tensors in it are sent as their bytes.

    Args:
        connection: one socket of `make_pair`.
        value: the object; its tensors are on the CPU.

    Raises:
        OSError: there is no memory or no file descriptor left, or the other process has ended.
    """
    text = io.BytesIO()
    pickler = _TensorPickler(text)
    pickler.dump(value)
    memory = create_memory()
    try:
        for offset, tensor in pickler.tensors:
            _write(memory, offset, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        _write(memory, pickler.bytes, text.getbuffer())
        header = _HEADER.pack(pickler.bytes, pickler.bytes + text.tell())
        socket.send_fds(connection, [header], [memory])
    finally:
        os.close(memory)


def receive(connection: socket.socket) -> Any:
    """Receive what the other process sent; its large tensors share the memory that was sent.

    That memory and one file descriptor are freed with the last of these tensors.

    Raises:
        EOFError: the other process has ended.
        OSError: this process may open no more files.
    """
    header, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
    if not header:
        raise EOFError
    if not descriptors:  # the kernel drops a descriptor that finds no place
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    try:
        start, end = _HEADER.unpack(header)
        memory = mmap.mmap(descriptors[0], end)
    finally:
        os.close(descriptors[0])
    return _TensorUnpickler(memory, start).load()


def create_memory() -> int:
    """A file descriptor of anonymous memory.

    Raises:
        OSError: there is none left.
    """
    create = getattr(os, "memfd_create", None)
    if create is not None:
        return int(create("onellm"))
    library = ctypes.CDLL(None, use_errno=True)  # a Python that was built for an older glibc
    descriptor = int(library.memfd_create(b"onellm", 1))  # 1: MFD_CLOEXEC
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def _write(memory: int, offset: int, data: Any) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(memory, view[:_MOST_BYTES], offset)
        view, offset = view[written:], offset + written


class _TensorPickler(pickle.Pickler):
    """Replaces every tensor by where its bytes will lie."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, torch.Tensor]] = []
        self.bytes = 0

    def persistent_id(self, value: Any) -> tuple[torch.dtype, Sequence[int], int] | None:
        if not isinstance(value, torch.Tensor):
            return None
        offset = self.bytes
        self.tensors.append((offset, value.detach()))
        self.bytes += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
        return value.dtype, tuple(value.shape), offset


class _TensorUnpickler(pickle.Unpickler):
    """Makes tensors of the memory that was received."""

    def __init__(self, memory: mmap.mmap, start: int) -> None:
        super().__init__(io.BytesIO(memory[start:]))
        self._memory = memory

    def persistent_load(self, place: tuple[torch.dtype, Sequence[int], int]) -> torch.Tensor:
        dtype, shape, offset = place
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        found = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)
        return (found.clone() if found.nbytes <= _SMALL_BYTES else found).view(shape)
