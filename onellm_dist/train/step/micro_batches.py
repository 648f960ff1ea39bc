"""The micro-batches of this rank, in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onellm_dist.data.loader import Loader
from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.data.plan import Plan
from onellm_dist.packed import PackedBatch
from onellm_dist.train.distributed import Distributed


class MicroBatchStream:
    """Opens a loader when the first micro-batch is asked for, and again after it was closed.

    Args:
        plan: the plan of the run.
        dist: the ranks.
        steps: optimizer steps of the whole run.
        left_out: sample id -> reason, of samples that are read with zero weight.
    """

    def __init__(
        self, plan: Plan, dist: Distributed, *, steps: int, left_out: Mapping[str, str]
    ) -> None:
        self._plan = plan
        self._dist = dist
        self._steps = steps
        self._left_out = left_out
        self._loader: Loader | None = None
        self._running: Iterator[tuple[MicroBatch, PackedBatch]] = iter(())

    def next(self, planned: MicroBatch) -> PackedBatch:
        """The pack of the next micro-batch, which must be `planned`; on a GPU, in its memory."""
        if self._loader is None:
            self._loader = Loader(
                self._plan,
                self._dist.world_size,
                self._dist.rank,
                planned.step,
                self._steps,
                skipped_samples=self._left_out,
                device=self._dist.device,
            )
            self._running = iter(self._loader)
        micro, batch = next(self._running)
        if (micro.step, micro.index) != (planned.step, planned.index):
            raise RuntimeError(
                f"the loader gave micro-batch {micro.index} of step {micro.step} for "
                f"{planned.index} of step {planned.step}"
            )
        return batch

    def close(self) -> None:
        """End the loader's workers."""
        if self._loader is not None:
            self._loader.close()
        self._loader = None
