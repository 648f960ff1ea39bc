"""Samples that could not be read, or that a list left out: recorded before their step is applied.

They are replayed on resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onellm_dist.common.files import repair_last_line
from onellm_dist.common.run_files import (
    LISTED_PATTERN,
    SKIPPED_PATTERN,
    make_listed_name,
    make_skipped_name,
)
from onellm_dist.train.records.json_lines import append_lines
from onellm_dist.train.records.left_out import read_left_out


class SkippedSamples:
    """The skipped samples of a run so far, from every start, whatever its number of ranks.

    `samples/skipped-rank00000.jsonl` has one object per line: `step`, `sample_id`, `reason`. Each
    rank writes its own file. `samples/skipped-inherited.jsonl` has those of the run whose
    checkpoint this one continued.

    Samples that a list left out have files of their own (`samples/listed-rank00000.jsonl`, ...).

    Args:
        folder: `RUN_DIR/samples`.
        rank: this rank.
        listed: whether these are the samples that a list left out.
    """

    def __init__(self, folder: Path, *, rank: int, listed: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / (make_listed_name(rank) if listed else make_skipped_name(rank))
        repair_last_line(self._path)
        self.known: dict[str, str] = read_skipped_samples(
            folder, LISTED_PATTERN if listed else SKIPPED_PATTERN
        )
        """Sample id (with its epoch) -> reason."""

    def record(self, step: int, skipped: Mapping[str, str]) -> int:
        """Write the samples that are not known yet, and force them to the disk.

        Args:
            step: index of the step that had them.
            skipped: sample id -> reason, of this rank's micro-batches.

        Returns:
            How many were new.
        """
        new = {name: reason for name, reason in skipped.items() if name not in self.known}
        if new:
            append_lines(
                self._path,
                (
                    {"step": step, "sample_id": name, "reason": reason}
                    for name, reason in new.items()
                ),
            )
            self.known.update(new)
        return len(new)


def read_skipped_samples(folder: Path, pattern: str = SKIPPED_PATTERN) -> dict[str, str]:
    """Sample id -> reason, from the files of all ranks.

    A line that a kill cut short is ignored: its step was not applied.
    """
    return {
        entry["sample_id"]: entry["reason"]
        for path in sorted(folder.glob(pattern))
        for entry in read_left_out(path)
    }
