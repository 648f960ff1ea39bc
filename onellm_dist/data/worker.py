"""What a loader worker is asked for, and how it reads."""

from __future__ import annotations

from typing import NamedTuple

from onellm_dist.common.workers.sandbox import Sandbox
from onellm_dist.common.workers.words import PoolWords
from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.data.reader import Reader
from onellm_dist.packed import PackedBatch

LOADER = PoolWords(
    worker="loader worker",
    result="batch",
    parent="training process",
    seconds="data.sample_seconds",
    megabytes="data.sample_mb",
    fewer="use fewer loader processes (data.workers) or fewer batches ahead (data.prefetch)",
)


class LoaderTask(NamedTuple):
    """What a worker is asked for: a micro-batch, and the one it will be asked for next."""

    micro: MicroBatch
    ahead: MicroBatch | None


class BatchReader:
    """Reads the micro-batches of a pool of workers.

    Args:
        reader: what it reads with.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @property
    def sandbox(self) -> Sandbox:
        """The limits of a sample."""
        return self._reader.sandbox

    @sandbox.setter
    def sandbox(self, sandbox: Sandbox) -> None:
        self._reader.sandbox = sandbox

    def read(self, task: LoaderTask) -> PackedBatch:
        """Read a micro-batch."""
        return self._reader.read(*task)

    def get_sample_id(self, task: LoaderTask, index: int) -> str:
        """Return the id of a sample of a micro-batch."""
        return self._reader.get_sample_id(task.micro, index)

    def skip(self, sample_id: str, reason: str) -> None:
        """Read a sample as a skipped one from now on."""
        self._reader.skip(sample_id, f"{sample_id}: {reason}")
