"""What a run inherits beside the weights when it resumes the checkpoint of another run.

Samples that were left out of the other run by then stay left out here. `skipped-inherited.jsonl`
has those that could not be read; excluded samples are added to this run's own `excluded.jsonl`.
What was found after the checkpoint is not inherited: the weights have not met it, and it will be
found again where it still holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.files import write_atomic
from onellm_dist.common.logging import get_logger
from onellm_dist.common.run_files import (
    CHECKPOINTS,
    EXCLUDED,
    SAMPLES,
    SKIPPED_INHERITED,
    SKIPPED_PATTERN,
)
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.checkpoint.folder import get_steps_done, read_manifest
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.records.applied_resumes import record_applied
from onellm_dist.train.records.json_lines import read_lines
from onellm_dist.train.records.run_directory import is_own

log = get_logger(__name__)


def apply_resume(config: RunConfig, target: ResumeTarget) -> None:
    """Inherit the sample log of another run, and record that `checkpoint.resume` was applied.

    Rank 0 calls it.
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
        count = inherit_samples(source.parent / SAMPLES, run_dir / SAMPLES, steps_done)
        if count:
            log.info("%s: %d samples stay left out, as in %s", run_dir, count, source.parent)
    if target.already_applied:
        log.info(
            "checkpoint.resume=%s was applied by an earlier start of this job: the run resumes",
            wanted,
        )
    elif wanted != "auto":
        record_applied(run_dir, wanted, os.environ)


def inherit_samples(source: Path, own: Path, steps_done: int) -> int:
    """Inherit what a sample log says about the first steps. Doing it twice changes nothing.

    Args:
        source: `samples/` of the other run.
        own: `samples/` of this run.
        steps_done: steps of the other run that the checkpoint contains.

    Returns:
        How many samples were inherited.
    """
    skipped = {
        entry["sample_id"]: entry
        for path in sorted(source.glob(SKIPPED_PATTERN))
        for entry in _read_entries(path)
        if entry["step"] < steps_done
    }
    excluded = [entry for entry in _read_entries(source / EXCLUDED) if entry["step"] < steps_done]
    own.mkdir(parents=True, exist_ok=True)
    kept = _read_entries(own / EXCLUDED)
    known = {entry["sample_id"] for entry in kept}
    new = [entry for entry in excluded if entry["sample_id"] not in known]
    _replace(own / SKIPPED_INHERITED, list(skipped.values()))
    _replace(own / EXCLUDED, kept + new)
    return len(skipped) + len(excluded)


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file; a line that a kill cut short is ignored: its step was not applied."""
    return [entry for entry in read_lines(path) if {"sample_id", "reason", "step"} <= entry.keys()]


def _replace(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    if entries or path.exists():
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in entries))
