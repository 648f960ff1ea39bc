"""The sample log of a run, `samples/`: which samples were left out, and how far it has come."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from onellm_dist.train.records.excluded_samples import ExcludedSamples
from onellm_dist.train.records.skipped_samples import SkippedSamples
from onellm_dist.train.records.stream_progress import StreamProgress


class SampleLog:
    """What a run records about its samples. `onellm samples` reads it.

    Args:
        folder: `RUN_DIR/samples`.
        rank: this rank; rank 0 writes what all ranks share.
    """

    def __init__(self, folder: Path, *, rank: int) -> None:
        self.skipped = SkippedSamples(folder, rank=rank)
        self.excluded = ExcludedSamples(folder, writes=rank == 0)
        self.unreadable = len(self.skipped.known.keys() - self.excluded.known.keys())
        """Samples that earlier starts could not read."""
        self.left_out: dict[str, str] = {**self.skipped.known, **self.excluded.known}
        """Sample id -> reason, of every sample that is read with zero weight."""
        self._progress = StreamProgress(folder, writes=rank == 0)

    def begin(self, first_step: int) -> int:
        """Record that the stream begins at `first_step`; return how many steps are repeated."""
        return self._progress.begin(first_step)

    def record_step(self, step: int, skipped: Mapping[str, str]) -> int:
        """Record a step before it is applied.

        Args:
            step: index of the step.
            skipped: sample id -> reason, of this rank's samples that could not be read.

        Returns:
            How many of them were not left out before.
        """
        self._progress.update(step + 1)
        new = {name: reason for name, reason in skipped.items() if name not in self.left_out}
        self.skipped.record(step, new)
        self.left_out.update(new)
        return len(new)

    def exclude(self, step: int, reason: str, sample_ids: Collection[str]) -> int:
        """Take samples out of the run; see `ExcludedSamples.exclude`."""
        count = self.excluded.exclude(step, reason, sample_ids)
        self.left_out.update(self.excluded.known)
        return count

    def close(self) -> None:
        """Close the files."""
        self._progress.close()
