"""The sample log of a run, `samples/`: which samples were left out, and how far it has come."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from onellm_dist.data.exclusions import PREFIX
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
        self.listed = SkippedSamples(folder, rank=rank, listed=True)
        self.excluded = ExcludedSamples(folder, writes=rank == 0)
        self.unreadable = len(self.skipped.known.keys() - self.excluded.known.keys())
        """Samples that earlier starts could not read."""
        self.left_out: dict[str, str] = {
            **self.skipped.known,
            **self.listed.known,
            **self.excluded.known,
        }
        """Sample id -> reason, of every sample that is read with zero weight."""
        self.new_unreadable: dict[str, str] = {}
        """Sample id -> reason, of this rank's samples of the latest step that could not be read."""
        self._progress = StreamProgress(folder, writes=rank == 0)

    def begin(self, first_step: int) -> int:
        """Record that the stream begins at `first_step`; return how many steps are repeated."""
        return self._progress.begin(first_step)

    def record_step(self, step: int, skipped: Mapping[str, str]) -> int:
        """Record a step before it is applied.

        Args:
            step: index of the step.
            skipped: sample id -> reason, of this rank's samples that could not be read, or that a
                list leaves out.

        Returns:
            How many could not be read and were not left out before; see `new_unreadable`.
        """
        self._progress.update(step + 1)
        new = {name: reason for name, reason in skipped.items() if name not in self.left_out}
        listed = {name: reason for name, reason in new.items() if reason.startswith(PREFIX)}
        unreadable = {name: reason for name, reason in new.items() if name not in listed}
        self.skipped.record(step, unreadable)
        self.listed.record(step, listed)
        self.left_out.update(new)
        self.new_unreadable = unreadable
        return len(unreadable)

    def exclude(self, step: int, reason: str, sample_ids: Collection[str]) -> int:
        """Take samples out of the run; see `ExcludedSamples.exclude`."""
        count = self.excluded.exclude(step, reason, sample_ids)
        self.left_out.update(self.excluded.known)
        return count

    def close(self) -> None:
        """Close the files."""
        self._progress.close()
