"""Media of requests as model inputs, decoded in processes apart from the server, within limits.

Each medium is decoded in a sandbox (`serving/media.py`): one that takes too much time or memory, or
that makes its decoder crash, is refused, and harms nothing else. A process decodes media of many
requests: a file that subverts its decoder could read or change those that are decoded after it.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any

import numpy as np
import torch

from onellm_dist.common.errors import MachineError, OneLLMError
from onellm_dist.common.workers.samples import SampleLimits
from onellm_dist.modalities import all_modalities
from onellm_dist.serving.media import GivenFiles, GivenFilesReader
from onellm_dist.serving.server.decoded import DecodedMedia


class MediaReader:
    """Decodes media in worker processes.

    Args:
        workers: number of processes.
        limits: what one medium may take.
    """

    def __init__(self, workers: int, limits: SampleLimits) -> None:
        self._workers = workers
        self._limits = limits
        self._pool = self._open()
        self._kept = DecodedMedia()
        self.decoded = 0
        """Media that were decoded; the others were kept from earlier requests."""

    def warm_up(self) -> None:
        """Start the processes, and let them import what decodes.

        Raises:
            BrokenProcessPool: they cannot be started.
        """
        for future in [self._pool.submit(_prepare) for _ in range(self._workers)]:
            future.result()

    async def read(
        self, media: Sequence[GivenFiles], digests: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        """Decode the media of a request; those of the last requests are kept.

        Args:
            media: their files.
            digests: `hash_files` of each; default: they are computed.

        Returns:
            [spans, *value_shape] of each.

        Raises:
            SampleError: one of them cannot be decoded within its limits.
            MachineError: the processes end without a word.
        """
        if digests is None:
            digests = await asyncio.to_thread(lambda: [hash_files(one) for one in media])
        keys = [f"{one.modality} {digest}" for one, digest in zip(media, digests, strict=True)]
        values = {key: value for key in keys if (value := self._kept.get(key)) is not None}
        numbered: dict[str, tuple[int, GivenFiles]] = {}
        for number, (key, one) in enumerate(zip(keys, media, strict=True), start=1):
            numbered.setdefault(key, (number, one))
        missing = {
            key: asyncio.ensure_future(self._decode(*each))
            for key, each in numbered.items()
            if key not in values
        }
        try:
            decoded = await asyncio.gather(*missing.values())
        finally:
            for task in missing.values():  # one failed, or nobody waits: no process reads the rest
                task.cancel()
        for key, value in zip(missing, decoded, strict=True):
            values[key] = value
            self._kept.put(key, value)
        return [values[key] for key in keys]

    async def _decode(self, number: int, medium: GivenFiles) -> torch.Tensor:
        for _ in range(2):
            pool = self._pool
            try:
                future = pool.submit(_read, number, medium, self._limits)
                found = await asyncio.wrap_future(future)
            except BrokenProcessPool:
                if self._pool is pool:  # another request may have replaced it already
                    self._pool = self._open()
                continue
            if isinstance(found, OneLLMError):
                raise found
            self.decoded += 1
            return torch.from_numpy(found)
        raise MachineError(
            "the processes that decode media were ended",
            "the machine has no memory left for them, or someone ended them.",
            "try again.",
        )

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _open(self) -> ProcessPoolExecutor:
        # Not forked: this process has threads, and a model.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    """Outlive the signals that end the server, but not the server (in a worker)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prepare() -> None:
    """Import all modalities (in a worker)."""
    torch.set_num_threads(1)
    all_modalities()


def _read(number: int, medium: GivenFiles, limits: SampleLimits) -> np.ndarray | OneLLMError:
    """Decode a medium (in a worker) to an array: a tensor would go through shared memory."""
    _prepare()
    try:
        (value,) = _open_reader(limits).read([medium], first=number)
        return value.numpy()
    except OneLLMError as error:
        return error


@cache
def _open_reader(limits: SampleLimits) -> GivenFilesReader:
    """What decodes (in a worker); its process ends with the worker."""
    return GivenFilesReader(limits)


def to_files(modality: str, item: Any) -> GivenFiles:
    """The files of a medium.

    Args:
        modality: its modality.
        item: the bytes of its first part, or part -> bytes.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(item, bytes):
        role = next(iter(all_modalities()[modality].required_parts))
        return GivenFiles(modality, {role: item})
    if isinstance(item, Mapping) and all(isinstance(data, bytes) for data in item.values()):
        return GivenFiles(modality, dict(item))
    raise TypeError(f"a medium of {modality} is a {type(item).__name__}")


def hash_files(given: GivenFiles) -> str:
    """SHA-256 of the files of a medium and its spans: what is made of it is kept by this."""
    digest = hashlib.sha256(f"{given.most} ".encode())
    for role, data in sorted(given.files.items()):
        digest.update(f"{role} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()
