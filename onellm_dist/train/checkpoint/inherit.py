"""What a run takes over beside the weights when it goes on from another run's checkpoint: the samples that were out by then.

`ledger/skipped_samples-ranks-source.jsonl`: that run's unreadable samples up to the checkpoint's step; its guard's marks go to this run's own.
What was found later is not taken: the weights have not met it, and it is found again where it still holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.files import sync
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.checkpoint.folder import get_steps_done, read_manifest
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.records.applied_resumes import note_obeyed
from onellm_dist.train.records.run_directory import CHECKPOINTS, LEDGER, is_own
from onellm_dist.train.records.skipped_samples import MARKS

TAKEN_OVER = "skipped_samples-ranks-source.jsonl"
"""Read back with every rank's own file."""


def take_over(config: RunConfig, found: ResumeTarget) -> None:
    """Where this start goes on from another run's checkpoint, its ledger; and the record that `checkpoint.resume` was obeyed. By rank 0."""
    run_dir, wanted = config.run.dir, config.checkpoint.resume
    source = None if found.folder is None else found.folder.resolve().parent
    if (
        found.folder is not None
        and source is not None
        and source.name == CHECKPOINTS
        and not is_own(run_dir / CHECKPOINTS, found.folder)
    ):
        step = get_steps_done(read_manifest(found.folder) or {})
        count = inherit_ledger(source.parent / LEDGER, run_dir / LEDGER, step)
        if count:
            print(
                f"{run_dir}: {count} samples that were out of the run of {found.folder} stay out",
                flush=True,
            )
    if found.already_applied:
        print(
            f"checkpoint.resume={wanted} was obeyed by an earlier start of this job: the run goes on",
            flush=True,
        )
    elif wanted != "auto":
        note_obeyed(run_dir, wanted, os.environ)


def inherit_ledger(source: Path, own: Path, step: int) -> int:
    """Take over what the ledger `source` says of the first `step` steps. Done twice it is the same. Rank 0 calls it.

    Returns:
        How many samples were taken over.
    """
    skipped_samples: dict[str, dict[str, Any]] = {}
    for path in sorted(source.glob("skipped_samples-rank*.jsonl")):
        if path.name != MARKS:
            skipped_samples |= {
                entry["sample_id"]: entry for entry in _entries(path) if entry["step"] < step
            }
    marks = [entry for entry in _entries(source / MARKS) if entry["step"] < step]
    own.mkdir(parents=True, exist_ok=True)
    kept = _entries(own / MARKS)
    known = {entry["sample_id"] for entry in kept}
    _replace(own / TAKEN_OVER, list(skipped_samples.values()))
    _replace(own / MARKS, kept + [entry for entry in marks if entry["sample_id"] not in known])
    sync(own)
    return len(skipped_samples) + len(marks)


def _entries(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill: its step was not applied
            continue
        if isinstance(entry, dict) and {"sample_id", "reason", "step"} <= entry.keys():
            found.append(entry)
    return found


def _replace(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    if not entries and not path.exists():
        return
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(entry) + "\n" for entry in entries)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)
