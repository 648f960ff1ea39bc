"""Samples that end the worker that reads them, in every way, for tests of pools of workers."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch

from onellm_dist.common.workers.pool import WorkerPool
from onellm_dist.common.workers.sandbox import OutOfMemoryError, Sandbox
from onellm_dist.common.workers.words import PoolWords

LIMIT_S = 0.6
WORDS = PoolWords(
    "loader worker", "batch", "parent", "sample_seconds", "sample_mb", "use fewer workers"
)


def crash() -> None:
    ctypes.string_at(0)


def hang() -> None:
    time.sleep(3600)


def spin() -> None:
    while True:
        pass


def deadlock() -> None:
    ctypes.CDLL(None).pause()  # in C code, which no exception of Python ends


def eat_memory() -> None:
    torch.ones(1 << 31, dtype=torch.uint8)


def eat_memory_slowly() -> None:
    kept = []
    while True:
        kept.append(np.ones(1 << 24, dtype=np.uint8))


def leave() -> None:
    os._exit(3)


def end() -> None:
    sys.exit(4)


def abort() -> None:
    os.abort()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


POISON: dict[str, tuple[Callable[[], None], str]] = {
    "crash": (crash, "crashed (SIGSEGV)"),
    "abort": (abort, "crashed (SIGABRT)"),
    "hang": (hang, "took more than 0.6 s (sample_seconds)"),
    "deadlock": (deadlock, "took more than 0.6 s (sample_seconds)"),
    "spin": (spin, "took more than 0.6 s (sample_seconds)"),
    "eat": (eat_memory, "needed more than 200 MiB (sample_mb)"),
    "eat slowly": (eat_memory_slowly, "needed more than 200 MiB (sample_mb)"),
    "leave": (leave, "ended with exit code 3"),
    "end": (end, "ended with exit code 1"),
    "kill": (kill, "was killed (SIGKILL)"),
}
QUICK = ("crash", "abort", "leave", "end", "kill", "eat")


class PoisonReader:
    """Reads samples by their number; what a sample does stands in `samples`."""

    def __init__(self, samples: list[str]) -> None:
        self.samples = samples
        self.skipped: dict[str, str] = {}
        self.sandbox = Sandbox()
        self.before: Callable[[range], object] = lambda task: None
        self.during: Callable[[], object] = lambda: None
        self.bytes = 0

    def get_sample_id(self, task: range, index: int) -> str:
        return str(task[index])

    def skip(self, sample_id: str, reason: str) -> None:
        self.skipped[sample_id] = f"{sample_id}: {reason}"

    def read(self, task: range) -> Any:
        faulthandler.disable()  # pytest's; the crashes are meant
        self.before(task)
        found = []
        for index, row in enumerate(task):
            name = str(row)
            with self.sandbox.sample(index):
                self.sandbox.decode()
                if name in self.skipped:
                    found.append(self.skipped[name])
                    continue
                self.during()
                behaviour = self.samples[row]
                if behaviour in POISON:
                    try:
                        POISON[behaviour][0]()
                    except RuntimeError as error:
                        raise OutOfMemoryError(str(error)) from error
                found.append(behaviour)
        return found, torch.arange(8 + self.bytes)


def make_tasks(count: int, per_batch: int) -> Iterator[range]:
    for start in range(0, count, per_batch):
        yield range(start, min(start + per_batch, count))


def make_pool(reader: PoisonReader, per_batch: int = 1, **keys: Any) -> WorkerPool[range, Any]:
    return WorkerPool(reader, make_tasks(len(reader.samples), per_batch), WORDS, **keys)


def read_all(reader: PoisonReader, workers: int, per_batch: int = 3, **keys: Any) -> list[Any]:
    keys = {"prefetch": 2, "sample_seconds": 60.0, "sample_mb": 200} | keys
    found = []
    with closing(make_pool(reader, per_batch, workers=workers, **keys)) as pool:
        while (item := pool.next()) is not None:
            found += open_batch(reader, item[1])
    return found


def open_batch(reader: PoisonReader, batch: Any) -> list[Any]:
    if isinstance(batch, Exception):
        raise batch
    samples, tensor = batch
    assert torch.equal(tensor, torch.arange(8 + reader.bytes))
    return list(samples)


def expect(samples: list[str]) -> list[str]:
    return [
        f"{row}: its worker {POISON[name][1]}, twice" if name in POISON else name
        for row, name in enumerate(samples)
    ]
