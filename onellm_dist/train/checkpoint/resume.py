"""Which checkpoint a start goes on from: the newest whole one whose files have their checksums, or the one that was asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.checkpoint.files import damaged
from onellm_dist.train.checkpoint.folder import (
    folders,
    read_manifest,
    recorded_files,
    restore_displaced,
)
from onellm_dist.train.checkpoint.source import check_source
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.records.applied_resumes import was_obeyed


@dataclass(frozen=True)
class Found:
    """What `find_checkpoint` found."""

    folder: Path | None
    """None: the run starts from nothing."""
    passed_over: tuple[tuple[str, str], ...] = ()
    """(checkpoint, what is wrong with it), of newer ones."""
    again: bool = False
    """An earlier start of this job obeyed `checkpoint.resume` already: this one goes on as with `auto`."""


def find_checkpoint(config: RunConfig, checkpoints: Path, dist: Distributed) -> Found:
    """The checkpoint to go on from. Called by all ranks; the files of each candidate are dealt over them and read once.

    `never` and a path hold for the first start of a job: a requeue runs the same command line, and goes on (obeyed.py).

    Args:
        checkpoints: `<run.dir>/checkpoints`; rank 0 holds the run's lock, so nobody writes there.

    Raises:
        UsageError: the one asked for is not whole or damaged, or was trained over other frozen weights.
        OneLLMError: there are checkpoints, and every one is damaged: a start from nothing would throw the run away.
    """
    wanted = config.checkpoint.resume
    if dist.is_rank_zero and checkpoints.is_dir():
        restore_displaced(checkpoints)
    dist.barrier()
    again = dist.broadcast(
        wanted != "auto" and was_obeyed(config.run.dir, wanted, os.environ)
        if dist.is_rank_zero
        else False
    )
    if wanted == "never" and not again:
        return Found(None)
    if isinstance(wanted, Path) and not again:
        return Found(_asked_for(wanted, config, dist))
    found = _newest(config, checkpoints, dist)
    if found.folder is None and isinstance(
        wanted, Path
    ):  # the first start of the job came to no checkpoint of its own
        found = Found(_asked_for(wanted, config, dist))
    return replace(found, again=again)


def _asked_for(wanted: Path, config: RunConfig, dist: Distributed) -> Path:
    problem = _problem(wanted, dist)
    if problem:
        raise UsageError(
            f"checkpoint.resume={wanted}: no whole checkpoint there ({problem})",
            "a checkpoint has a manifest.json and every file that it names, with its checksum.",
            "give a step-... folder of a run's checkpoints/, or auto.",
        )
    check_source(wanted, _manifest(wanted, dist) or {}, config, dist)
    return wanted


def _newest(config: RunConfig, checkpoints: Path, dist: Distributed) -> Found:
    passed_over: list[tuple[str, str]] = []
    for folder in dist.broadcast(list(reversed(folders(checkpoints))) if dist.is_rank_zero else []):
        problem = _problem(folder, dist)
        if not problem:
            check_source(folder, _manifest(folder, dist) or {}, config, dist)
            return Found(folder, tuple(passed_over))
        passed_over.append((folder.name, problem))
    if passed_over:
        raise OneLLMError(
            f"every checkpoint in {checkpoints} is damaged: "
            + "; ".join(f"{name}: {problem}" for name, problem in passed_over[:3]),
            "a start from nothing would lose what the run has learnt.",
            "restore one of them from a copy, or set checkpoint.resume=never to begin anew (they are moved aside then).",
        )
    return Found(None)


def _problem(folder: Path, dist: Distributed) -> str:
    """What is wrong with a checkpoint; "" where nothing is. The same on every rank."""
    manifest = _manifest(folder, dist)
    if manifest is None:
        return "its manifest.json or a file that it names is missing or cut short"
    return "; ".join(damaged(recorded_files(folder, manifest), dist))


def _manifest(folder: Path, dist: Distributed) -> dict[str, Any] | None:
    """Rank 0 reads it, so that all judge by the same."""
    return dist.broadcast(read_manifest(folder) if dist.is_rank_zero else None)
