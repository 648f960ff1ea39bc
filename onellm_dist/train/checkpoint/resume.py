"""Which checkpoint a start resumes: the latest complete one, or the one that the recipe names."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.checkpoint.files import find_damage
from onellm_dist.train.checkpoint.folder import (
    get_file_records,
    list_checkpoints,
    read_manifest,
    restore_checkpoints,
)
from onellm_dist.train.checkpoint.reference import check_reference
from onellm_dist.train.checkpoint.source import check_source
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.records.applied_resumes import was_applied


@dataclass(frozen=True)
class ResumeTarget:
    """What a start resumes from."""

    folder: Path | None
    """The checkpoint; None: the run starts from nothing."""
    damaged: tuple[tuple[str, str], ...] = ()
    """Newer checkpoints that are damaged: (name, what is wrong)."""
    already_applied: bool = False
    """Whether an earlier start of this job applied `checkpoint.resume`; this one resumes as with
    `auto`."""


def find_checkpoint(config: RunConfig, checkpoints: Path, dist: Distributed) -> ResumeTarget:
    """Find the checkpoint to resume. All ranks call it; each file is read once, by one of them.

    `checkpoint.resume=never` and a path hold for the first start of a job: a requeue runs the same
    command line, and resumes (records/applied_resumes.py).

    Args:
        config: the recipe.
        checkpoints: `<run.dir>/checkpoints`; rank 0 holds the run's lock, so nobody writes there.
        dist: the ranks.

    Raises:
        UsageError: the checkpoint that the recipe names is not complete or damaged, or a checkpoint
            was trained over other frozen weights or against another reference.
        OneLLMError: there are checkpoints, and all of them are damaged: starting from nothing would
            lose the run.
    """
    wanted = config.checkpoint.resume

    def find_earlier_start() -> bool:
        if checkpoints.is_dir():
            restore_checkpoints(checkpoints)
        return wanted != "auto" and was_applied(config.run.dir, wanted, os.environ)

    already_applied = dist.ask_rank_zero(find_earlier_start)
    if isinstance(wanted, Path):
        wanted = wanted.resolve()  # a link such as `latest` may point elsewhere tomorrow
    if wanted == "never" and not already_applied:
        return ResumeTarget(None)
    if isinstance(wanted, Path) and not already_applied:
        return ResumeTarget(_check_named(wanted, config, dist))
    target = _find_latest(config, checkpoints, dist)
    if target.folder is None and isinstance(wanted, Path):
        # The first start of the job wrote no checkpoint of its own.
        target = ResumeTarget(_check_named(wanted, config, dist))
    return replace(target, already_applied=already_applied)


def _check_named(wanted: Path, config: RunConfig, dist: Distributed) -> Path:
    problem = _find_problem(wanted, dist)
    if problem:
        raise UsageError(
            f"checkpoint.resume={wanted}: no complete checkpoint there ({problem})",
            "a checkpoint has a manifest.json and every file that it names, with its checksum.",
            "give a step-... folder of a run's checkpoints/, or auto.",
        )
    _check_fits(wanted, config, dist)
    return wanted


def _find_latest(config: RunConfig, checkpoints: Path, dist: Distributed) -> ResumeTarget:
    damaged: list[tuple[str, str]] = []
    for folder in dist.ask_rank_zero(lambda: list(reversed(list_checkpoints(checkpoints)))):
        problem = _find_problem(folder, dist)
        if not problem:
            _check_fits(folder, config, dist)
            return ResumeTarget(folder, tuple(damaged))
        damaged.append((folder.name, problem))
    if damaged:
        raise OneLLMError(
            f"every checkpoint in {checkpoints} is damaged: "
            + "; ".join(f"{name}: {problem}" for name, problem in damaged[:3]),
            "starting from nothing would lose what the run has learned.",
            "restore one of them from a copy, or set checkpoint.resume=never to start over (they "
            "then move to before-.../).",
        )
    return ResumeTarget(None)


def _check_fits(folder: Path, config: RunConfig, dist: Distributed) -> None:
    """Refuse a checkpoint that means something else with this recipe."""
    manifest = _read_manifest(folder, dist) or {}
    check_reference(folder, manifest, config)
    check_source(folder, manifest, config, dist)


def _find_problem(folder: Path, dist: Distributed) -> str:
    """What is wrong with a checkpoint; "" if nothing is. The same on every rank."""
    manifest = _read_manifest(folder, dist)
    if manifest is None:
        return "its manifest.json or a file that it names is missing, damaged or cut short"
    return "; ".join(find_damage(get_file_records(folder, manifest), dist))


def _read_manifest(folder: Path, dist: Distributed) -> dict[str, Any] | None:
    """The manifest as rank 0 reads it, so that all ranks decide by the same."""
    return dist.ask_rank_zero(lambda: read_manifest(folder))
