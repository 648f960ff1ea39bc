"""The ledger of a run: which samples could not be read, in which step. Written before the step is applied, replayed on resume.

`ledger/tombstones-rank00000.jsonl`: one object a line, `step`, `sample_id`, `reason`; one file a rank, so that no two write one file.
`ledger/segments.json`: the segments of the plan (data/segments.py), for people; a resume goes by the copy in its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from onellm_dist.data.segments import Segment
from onellm_dist.packed import PackedBatch


class Ledger:
    """Tombstones of the run so far, from every earlier start, whatever its number of ranks."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"tombstones-rank{rank:05d}.jsonl"
        self.known: dict[str, str] = {}
        """Sample id (with its epoch) -> reason."""
        for path in sorted(folder.glob("tombstones-rank*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = _parse(line)
                if entry is not None:
                    self.known[entry["sample_id"]] = entry["reason"]

    def record(self, step: int, batches: list[PackedBatch]) -> int:
        """Write the tombstones of this rank's micro-batches that are not known yet, and force them to the disk.

        Returns:
            How many were new.
        """
        new = {
            batch.sample_ids[i]: reason
            for batch in batches
            for i, reason in batch.tombstones.items()
            if batch.sample_ids[i] not in self.known
        }
        if not new:
            return 0
        with self._path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps({"step": step, "sample_id": name, "reason": reason}) + "\n" for name, reason in new.items())
            out.flush()
            os.fsync(out.fileno())
        self.known.update(new)
        return len(new)


def write_segments(folder: Path, segments: Sequence[Segment]) -> None:
    """Replace `segments.json`, durably. Rank 0 calls it."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ".segments.json.partial"
    with aside.open("w", encoding="utf-8") as out:
        json.dump([segment.to_json() for segment in segments], out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(folder / "segments.json")
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parse(line: str) -> dict[str, str] | None:
    """A line, or None for one that a kill cut short: its step was not applied then."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and {"sample_id", "reason"} <= entry.keys() else None
