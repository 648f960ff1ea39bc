"""What a run inherits beside the weights when it resumes the checkpoint of another run.

Samples that were left out of the other run by then stay left out here. `skipped-inherited.jsonl`
has those that could not be read, `listed-inherited.jsonl` the uses that a list left out; excluded
samples are added to this run's own `excluded.jsonl`. What was found after the checkpoint is not
inherited: the weights have not met it, and it will be found again where it still holds.

The entries of the other run's `exclude.txt` are added to this run's, whenever they were made: that
run would have left them out from this checkpoint on.
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
    EXCLUDE_LIST,
    EXCLUDED,
    LISTED_INHERITED,
    LISTED_PATTERN,
    SAMPLES,
    SKIPPED_INHERITED,
    SKIPPED_PATTERN,
)
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.exclusions import add_entries, read_entries
from onellm_dist.train.checkpoint.folder import get_steps_done, read_manifest
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.records.applied_resumes import record_applied
from onellm_dist.train.records.left_out import read_left_out
from onellm_dist.train.records.run_directory import is_own

log = get_logger(__name__)


def apply_resume(config: RunConfig, target: ResumeTarget) -> None:
    """Inherit the sample log of another run, and record that `checkpoint.resume` was applied.

    Rank 0 calls it.
    """
    run_dir = config.run.dir
    wanted = config.checkpoint.resume
    source = find_source_run(run_dir, target)
    if source is not None and target.folder is not None:
        steps_done = get_steps_done(read_manifest(target.folder) or {})
        count = inherit_samples(source / SAMPLES, run_dir / SAMPLES, steps_done)
        if count:
            log.info("%s: %d samples stay left out, as in %s", run_dir, count, source)
        entries = inherit_list(source / EXCLUDE_LIST, run_dir / EXCLUDE_LIST)
        if entries:
            log.info("%s: inherits %d entries of %s", run_dir, entries, source / EXCLUDE_LIST)
    if target.already_applied:
        log.info(
            "checkpoint.resume=%s was applied by an earlier start of this job: the run resumes",
            wanted,
        )
    elif wanted != "auto":
        record_applied(run_dir, wanted, os.environ)


def find_source_run(run_dir: Path, target: ResumeTarget) -> Path | None:
    """The directory of the other run whose checkpoint is resumed; None: there is no other run."""
    if target.folder is None or is_own(run_dir / CHECKPOINTS, target.folder):
        return None
    checkpoints = target.folder.resolve().parent
    return checkpoints.parent if checkpoints.name == CHECKPOINTS else None


def inherit_list(source: Path, own: Path) -> int:
    """Add the entries of another run's list to this run's; return how many are new here."""
    return len(add_entries(own, read_entries(source))) if source.exists() else 0


def inherit_samples(source: Path, own: Path, steps_done: int) -> int:
    """Inherit what a sample log says about the first steps. Doing it twice changes nothing.

    Args:
        source: `samples/` of the other run.
        own: `samples/` of this run.
        steps_done: steps of the other run that the checkpoint contains.

    Returns:
        How many samples were inherited.
    """
    skipped, listed = (
        {
            entry["sample_id"]: entry
            for path in sorted(source.glob(pattern))
            for entry in read_left_out(path)
            if entry["step"] < steps_done
        }
        for pattern in (SKIPPED_PATTERN, LISTED_PATTERN)
    )
    excluded = [entry for entry in read_left_out(source / EXCLUDED) if entry["step"] < steps_done]
    own.mkdir(parents=True, exist_ok=True)
    kept = read_left_out(own / EXCLUDED)
    known = {entry["sample_id"] for entry in kept}
    new = [entry for entry in excluded if entry["sample_id"] not in known]
    _replace(own / SKIPPED_INHERITED, list(skipped.values()))
    _replace(own / LISTED_INHERITED, list(listed.values()))
    _replace(own / EXCLUDED, kept + new)
    return len(skipped) + len(listed) + len(excluded)


def _replace(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    if entries or path.exists():
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in entries))
