"""Samples that a rollback took out of a run, because a step went wrong over them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from onellm_dist.common.files import repair_last_line
from onellm_dist.common.run_files import EXCLUDED
from onellm_dist.train.records.json_lines import append_lines
from onellm_dist.train.records.left_out import read_left_out


class ExcludedSamples:
    """The excluded samples of a run, from every start.

    `samples/excluded.jsonl` has one object per line: `step` (the one that went wrong), `sample_id`,
    `reason`, `rollback` (its number in the run). Rank 0 writes it before anything is undone. Every
    start reads it, so that the samples keep their places with zero weight.

    Args:
        folder: `RUN_DIR/samples`.
        writes: whether this process writes; false on every rank but rank 0.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self._path = folder / EXCLUDED
        self._writes = writes
        if writes:
            repair_last_line(self._path)
        self.known: dict[str, str] = {}
        """Sample id (with its epoch) -> reason."""
        self.rollbacks = 0
        """Rollbacks of the whole run."""
        for entry in read_left_out(self._path):
            if type(entry.get("rollback")) is int:
                self.known[entry["sample_id"]] = entry["reason"]
                self.rollbacks = max(self.rollbacks, entry["rollback"])

    def exclude(self, step: int, reason: str, sample_ids: Collection[str]) -> int:
        """Exclude samples durably. Called by all ranks, which then must wait for rank 0.

        Args:
            step: index of the step that went wrong.
            reason: what went wrong.
            sample_ids: the samples to exclude.

        Returns:
            How many of them are new.
        """
        self.rollbacks += 1
        new = {
            name: f"excluded: {reason}, in step {step}"
            for name in sample_ids
            if name not in self.known
        }
        if self._writes and new:
            append_lines(
                self._path,
                (
                    {"step": step, "sample_id": name, "reason": text, "rollback": self.rollbacks}
                    for name, text in new.items()
                ),
            )
        self.known.update(new)
        return len(new)
