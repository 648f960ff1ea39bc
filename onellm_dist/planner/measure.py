"""Measures what the planner's constants say of a device: rates of its kernels, and its host.

Each measurement repeats an operation of the model at a size that the model has, for a second or so.
A GPU is waited for between batches of calls, never between two calls.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from onellm_dist.model.attention import packed_attention
from onellm_dist.model.quantised.float8 import multiply_rows, round_rows
from onellm_dist.model.sequence_lengths import SequenceLengths

Run = Callable[[], Any]
BATCH_S = 0.05
"""Seconds of calls between two looks at the clock."""
THIN = 64
"""Summed dimension of the thin matrix product."""
HEAD = 64
HEADS = 16
SEQUENCE = 256
"""Tokens of a sequence of attention, about those of a picture."""
TINY_KERNELS = 1000
"""Kernels of a graph whose shortest time is measured."""
MEGA = 1 << 20


@dataclass(frozen=True)
class MeasuredSizes:
    """Sizes at which a kind of device is measured."""

    rows: int
    """Rows of the matrix products."""
    width: int
    """Columns and summed dimension of the large matrix product."""
    sequences: int
    """Sequences in the pack of attention."""
    pictures: int
    """Pictures of the patch convolution."""
    copied: int
    """Bytes of the copy that measures the memory."""


GPU_SIZES = MeasuredSizes(8192, 4096, 256, 64, 1024 * MEGA)
CPU_SIZES = MeasuredSizes(1024, 1024, 8, 2, 128 * MEGA)


class DeviceMeter:
    """Measures one device.

    Args:
        device: the device.
        seconds: seconds of each measurement.
        sizes: default: those of its kind.
    """

    def __init__(
        self, device: torch.device, *, seconds: float, sizes: MeasuredSizes | None = None
    ) -> None:
        self.device = device
        self._seconds = seconds
        self._sizes = sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES)

    def measure(self, run: Run) -> float:
        """Seconds of a call: the median over batches of calls."""
        run()
        self._wait()
        once = self._time(run, 1)
        calls = max(1, min(1000, int(BATCH_S / max(once, 1e-7))))
        found = list[float]()
        end = time.perf_counter() + self._seconds
        while not found or time.perf_counter() < end:
            found.append(self._time(run, calls))
        return statistics.median(found)

    def _time(self, run: Run, calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        self._wait()
        return (time.perf_counter() - begin) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _make(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def measure_product(self, dtype: torch.dtype, inner: int | None = None) -> float:
        """FLOP/s of a matrix product.

        Args:
            dtype: of both factors.
            inner: the summed dimension; default: as wide as the others.
        """
        rows, width = self._sizes.rows, self._sizes.width
        inner = inner or width
        left, right = self._make(rows, inner, dtype=dtype), self._make(inner, width, dtype=dtype)
        return 2 * rows * inner * width / self.measure(lambda: left @ right)

    def measure_float8_product(self) -> float:
        """FLOP/s of a matrix product of float8, each row of both factors with its scale."""
        rows, width = self._sizes.rows, self._sizes.width
        left, right = (
            round_rows(self._make(n, width, dtype=torch.bfloat16)) for n in (rows, width)
        )
        return (
            2 * rows * width**2 / self.measure(lambda: multiply_rows(left, right, torch.bfloat16))
        )

    def measure_attention(self, dtype: torch.dtype) -> float:
        """FLOP/s of forward attention over a pack, by the kernel that a run would use."""
        count = self._sizes.sequences
        lengths = SequenceLengths.from_lengths([SEQUENCE] * count, device=self.device)
        q, k, v = (self._make(SEQUENCE * count, HEADS, HEAD, dtype=dtype) for _ in range(3))
        flops = 4 * count * SEQUENCE**2 * HEADS * HEAD
        return flops / self.measure(lambda: packed_attention(q, k, v, lengths))

    def measure_convolution(self, dtype: torch.dtype) -> float:
        """FLOP/s of the patch convolution of CLIP ViT-L/14."""
        count, width, patch = self._sizes.pictures, 1024, 14
        pixels = self._make(count, 3, 224, 224, dtype=dtype)
        weight = self._make(width, 3, patch, patch, dtype=dtype)
        flops = 2 * count * (224 // patch) ** 2 * width * 3 * patch * patch
        return flops / self.measure(lambda: F.conv2d(pixels, weight, stride=patch))

    def measure_bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes in the device's memory."""
        source = torch.ones(self._sizes.copied // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.measure(lambda: target.copy_(source))

    def measure_to_host(self) -> float:
        """Bytes per second from the device to the host's page-locked memory."""
        if self.device.type != "cuda":
            return self.measure_bandwidth() / 2
        source = torch.ones(self._sizes.copied // 4, device=self.device)
        target = torch.empty(source.shape, pin_memory=True)
        return source.nbytes / self.measure(lambda: target.copy_(source, non_blocking=True))

    def measure_shortest_kernel(self) -> float:
        """Seconds of a kernel that does next to nothing; 0 on processors, where the host counts."""
        if self.device.type != "cuda":
            return 0.0
        one = torch.zeros(1, device=self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(TINY_KERNELS):
                one.add_(1)
        return self.measure(graph.replay) / TINY_KERNELS

    def measure_neighbour(self) -> float | None:
        """Bytes per second between two devices of this machine; None: there is one GPU alone."""
        if self.device.type != "cuda":
            return measure_loopback(self._seconds)
        if torch.cuda.device_count() < 2:
            return None
        source = torch.ones(self._sizes.copied // 4, device=self.device)
        other = next(i for i in range(torch.cuda.device_count()) if i != self.device.index)
        target = torch.empty(source.shape, device=torch.device("cuda", other))
        return source.nbytes / self.measure(lambda: target.copy_(source, non_blocking=True))

    def measure_call(self) -> float:
        """Seconds that the host takes for one ATen call in forward."""
        one, other = torch.ones(1, device=self.device), torch.ones(1, device=self.device)
        with torch.no_grad():
            return self.measure(lambda: torch.add(one, other))

    def measure_passes(self, make_loss: Callable[[], torch.Tensor]) -> tuple[float, float]:
        """Seconds that the host takes for forward and for backward, the device not waited for."""
        make_loss().backward()
        self._wait()
        forward, backward = list[float](), list[float]()
        end = time.perf_counter() + self._seconds
        while not forward or time.perf_counter() < end:
            begin = time.perf_counter()
            loss = make_loss()
            middle = time.perf_counter()
            loss.backward()
            forward.append(middle - begin)
            backward.append(time.perf_counter() - middle)
            self._wait()
        return statistics.median(forward), statistics.median(backward)


def measure_loopback(seconds: float) -> float:
    """Bytes per second through this machine's loopback interface, by which local ranks talk."""
    with _connect() as (near, far):
        block = bytes(MEGA)
        end, sent = time.perf_counter() + seconds, 0
        reader = threading.Thread(target=_drain, args=(far,), daemon=True)
        reader.start()
        begin = time.perf_counter()
        while not sent or time.perf_counter() < end:
            near.sendall(block)
            sent += len(block)
        near.shutdown(socket.SHUT_WR)
        reader.join()
        return sent / (time.perf_counter() - begin)


@contextmanager
def _connect() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        with near, far:
            yield near, far


def _drain(connection: socket.socket) -> None:
    while connection.recv(MEGA):
        pass
