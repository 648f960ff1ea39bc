"""What a run inherits beside the weights when it resumes another run's checkpoint.

It inherits the samples that were out of that run by then. Unreadable samples up to the checkpoint
go to `skipped_samples-ranks-source.jsonl`, and the samples that its rollbacks excluded go to this
run's own excluded samples. What was found later is not inherited: the weights have not met it,
and it is found again where it still holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.files import sync, write_atomic
from onellm_dist.common.logging import get_logger
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.checkpoint.folder import get_steps_done, read_manifest
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.records.applied_resumes import note_obeyed
from onellm_dist.train.records.run_directory import CHECKPOINTS, LEDGER, is_own
from onellm_dist.train.records.skipped_samples import MARKS

log = get_logger(__name__)
INHERITED = "skipped_samples-ranks-source.jsonl"
"""Read back with every rank's own file."""


def apply_resume(config: RunConfig, target: ResumeTarget) -> None:
    """Inherit the samples of another run's checkpoint, and record that `checkpoint.resume` applied.

    Rank 0 calls it, before the sample log is opened.
    """
    run_dir = config.run.dir
    wanted = config.checkpoint.resume
    source = None if target.folder is None else target.folder.resolve().parent
    if (
        target.folder is not None
        and source is not None
        and source.name == CHECKPOINTS
        and not is_own(run_dir / CHECKPOINTS, target.folder)
    ):
        steps_done = get_steps_done(read_manifest(target.folder) or {})
        count = inherit_samples(source.parent / LEDGER, run_dir / LEDGER, steps_done)
        if count:
            log.info("%s: %d samples that %s left out stay out", run_dir, count, target.folder)
    if target.already_applied:
        log.info("checkpoint.resume=%s: applied by an earlier start of this job", wanted)
    elif wanted != "auto":
        note_obeyed(run_dir, wanted, os.environ)


def inherit_samples(source: Path, own: Path, steps_done: int) -> int:
    """Inherit what the sample log `source` says of the first steps. A second call changes nothing.

    Args:
        source: the sample log of the other run.
        own: the sample log of this run.
        steps_done: number of steps that the checkpoint has done.

    Returns:
        How many samples were inherited.
    """
    skipped: dict[str, dict[str, Any]] = {}
    for path in sorted(source.glob("skipped_samples-rank*.jsonl")):
        if path.name != MARKS:
            skipped |= {
                entry["sample_id"]: entry
                for entry in _read_entries(path)
                if entry["step"] < steps_done
            }
    excluded = [entry for entry in _read_entries(source / MARKS) if entry["step"] < steps_done]
    own.mkdir(parents=True, exist_ok=True)
    kept = _read_entries(own / MARKS)
    known = {entry["sample_id"] for entry in kept}
    new = [entry for entry in excluded if entry["sample_id"] not in known]
    _write_entries(own / INHERITED, list(skipped.values()))
    _write_entries(own / MARKS, kept + new)
    sync(own)
    return len(skipped) + len(excluded)


def _read_entries(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut short by a kill: its step was not applied
            continue
        if isinstance(entry, dict) and {"sample_id", "reason", "step"} <= entry.keys():
            found.append(entry)
    return found


def _write_entries(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    if entries or path.exists():
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in entries))
