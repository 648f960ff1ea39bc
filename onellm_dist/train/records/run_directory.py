"""The run directory: one start at a time, what an earlier run left there, and the resolved recipe."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import restore_folder
from onellm_dist.common.run_files import CHECKPOINT_PREFIX, MODEL
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.callbacks.best_model import BEST
from onellm_dist.train.callbacks.profiler import FOLDER as PROFILES
from onellm_dist.train.callbacks.sample_generation import SAMPLES
from onellm_dist.train.callbacks.trackers import FOLDER as TRACKERS
from onellm_dist.train.callbacks.validation import VALIDATION
from onellm_dist.train.records.metrics import EVENTS, METRICS, TENSORBOARD

CHECKPOINTS, LEDGER, CONFIG, LOCK = "checkpoints", "ledger", "config.yaml", ".lock"
LOCK_PATIENCE_S = 30.0
"""Seconds that a start waits for the ranks of the one before it, which may have been killed just now."""


def lock_directory(run_dir: Path) -> IO[str]:
    """Hold the run directory until this process ends. Rank 0 calls it.

    The `deepspeed` launcher, when killed, leaves its ranks running: two starts would write one run.

    Raises:
        OneLLMError: another start of this run is still going.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    held = (run_dir / LOCK).open("w", encoding="utf-8")
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except OSError as error:
            if error.errno not in (
                errno.EACCES,
                errno.EAGAIN,
            ):  # a file system without locks: go on without
                return held
        if time.monotonic() > deadline:
            raise OneLLMError(
                f"{run_dir} is in use by another start of this run",
                "both would write its checkpoints.",
                "end that one first, or give another run.dir.",
            )
        time.sleep(0.2)


def prepare_directory(config: RunConfig, resume: Path | None) -> None:
    """Move aside what this start does not go on from, and write the resolved recipe. Rank 0 calls it.

    A start from nothing moves everything of an earlier run; a start from an older checkpoint moves the newer ones, so that the next
    `checkpoint.resume=auto` does not take them; a start from another run's checkpoint moves every checkpoint.
    """
    run_dir = config.run.dir
    for name in (MODEL, BEST):
        restore_folder(run_dir / name)
    names = (
        CHECKPOINTS,
        LEDGER,
        METRICS,
        EVENTS,
        VALIDATION,
        SAMPLES,
        TENSORBOARD,
        PROFILES,
        TRACKERS,
        MODEL,
        BEST,
    )
    everything = [path for name in names if _holds_something(path := run_dir / name)]
    stale = everything if resume is None else _not_before(run_dir / CHECKPOINTS, resume)
    if stale:
        aside = move_aside(run_dir, stale)
        print(
            f"{run_dir}: moved {', '.join(p.name for p in stale)} of an earlier start to {aside.name}/",
            flush=True,
        )
    (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
    (run_dir / CONFIG).write_text(config.to_yaml(), encoding="utf-8")


def move_aside(run_dir: Path, paths: Sequence[Path]) -> Path:
    """Move files and folders of the run to `before-.../`, which is returned. What was moved there in the same second stays."""
    aside = run_dir / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir(exist_ok=True)
    for path in paths:
        place, number = aside / path.name, 2
        while place.exists():
            place, number = aside / f"{path.name}.{number}", number + 1
        path.rename(place)
    return aside


def is_own(checkpoints: Path, resume: Path) -> bool:
    """Whether a checkpoint is one of this run's `checkpoints`."""
    return resume.resolve().parent == checkpoints.resolve()


def _holds_something(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _not_before(checkpoints: Path, resume: Path) -> list[Path]:
    """The checkpoints that are not a history of `resume`."""
    own = is_own(checkpoints, resume)
    return sorted(
        path
        for path in checkpoints.glob(f"{CHECKPOINT_PREFIX}*")
        if not own or path.name > resume.name
    )
