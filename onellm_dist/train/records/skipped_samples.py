"""The ledger of a run: which samples could not be read, in which step. Written before the step is applied, replayed on resume.

`ledger/skipped_samples-rank00000.jsonl`: one object a line, `step`, `sample_id`, `reason`; one file a rank, so that no two write one file.
`ledger/data_phases.json`: the data_phases of the plan (data/phases.py), for people; a resume goes by the copy in its checkpoint.
`ledger/datasets.json`: dataset -> where it lies, of all data_phases.
`ledger/progress`: how many steps were done, overwritten in place each step by rank 0; a kill of the process does not lose it.
`ledger/starts.jsonl`: one object a start, `time`, `first_step`, `lost_to`: steps first_step .. lost_to - 1 had been done before.
`onellm samples` (lookup.py) reads them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from onellm_dist.common.files import repair_last_line, sync
from onellm_dist.data.phases import DataPhase
from onellm_dist.packed import PackedBatch

DATA_PHASES, DATASETS, PROGRESS, STARTS = (
    "data_phases.json",
    "datasets.json",
    "progress",
    "starts.jsonl",
)
PROGRESS_BYTES = 16
MARKS = "skipped_samples-ranks-guard.jsonl"
"""Samples that the stability monitor excluded from the run."""


class Ledger:
    """Tombstones of the run so far, from every earlier start, whatever its number of ranks."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._progress = (
            os.open(folder / PROGRESS, os.O_RDWR | os.O_CREAT, 0o644) if rank == 0 else None
        )
        self._path = folder / f"skipped_samples-rank{rank:05d}.jsonl"
        repair_last_line(self._path)
        if rank == 0:
            repair_last_line(folder / STARTS)
        self.known: dict[str, str] = {}
        """Sample id (with its epoch) -> reason."""
        for path in sorted(folder.glob("skipped_samples-rank*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = _parse(line)
                if entry is not None:
                    self.known[entry["sample_id"]] = entry["reason"]

    def begin(self, first_step: int) -> int:
        """The stream begins, or begins again, at `first_step` (a start, a resume, a roll-back): says so in `starts.jsonl`.

        Returns:
            How many steps had been done already and are done again (on rank 0; 0 elsewhere).
        """
        if self._progress is None:
            return 0
        text = os.pread(self._progress, PROGRESS_BYTES, 0).strip()
        done = int(text) if text.isdigit() else 0
        lost_to = done if done > first_step else None
        with (self._folder / STARTS).open("a", encoding="utf-8") as out:
            out.write(
                json.dumps(
                    {
                        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                        "first_step": first_step,
                        "lost_to": lost_to,
                    }
                )
                + "\n"
            )
            out.flush()
            os.fsync(out.fileno())
        self._write_progress(first_step)
        return 0 if lost_to is None else lost_to - first_step

    def _write_progress(self, steps: int) -> None:
        if self._progress is not None:
            os.pwrite(self._progress, f"{steps:<{PROGRESS_BYTES - 1}}\n".encode(), 0)

    def record(self, step: int, batches: list[PackedBatch]) -> int:
        """Write the skipped_samples of this rank's micro-batches that are not known yet, and force them to the disk.

        Returns:
            How many were new.
        """
        self._write_progress(step + 1)
        new = {
            batch.sample_ids[i]: reason
            for batch in batches
            for i, reason in batch.skipped_samples.items()
            if batch.sample_ids[i] not in self.known
        }
        if not new:
            return 0
        with self._path.open("a", encoding="utf-8") as out:
            out.writelines(
                json.dumps({"step": step, "sample_id": name, "reason": reason}) + "\n"
                for name, reason in new.items()
            )
            out.flush()
            os.fsync(out.fileno())
        self.known.update(new)
        return len(new)


def write_stream(folder: Path, data_phases: Sequence[DataPhase], places: Mapping[str, str]) -> None:
    """Replace `data_phases.json`, and add to `datasets.json` where the datasets lie, durably. Rank 0 calls it."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / DATASETS
    before = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    _replace(folder / DATA_PHASES, [data_phase.to_json() for data_phase in data_phases])
    _replace(known, {**before, **places})


def _replace(path: Path, value: object) -> None:
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)
    sync(path.parent)


def _parse(line: str) -> dict[str, str] | None:
    """A line, or None for one that a kill cut short: its step was not applied then."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and {"sample_id", "reason"} <= entry.keys() else None
