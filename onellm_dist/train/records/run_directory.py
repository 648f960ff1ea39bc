"""The run directory: one start at a time, what earlier runs left there, and the resolved recipe."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from onellm_dist.common.errors import RunInUseError, UsageError
from onellm_dist.common.files import restore_folder, write_atomic
from onellm_dist.common.logging import get_logger
from onellm_dist.common.run_files import (
    ADAPTER,
    BEST,
    CHECKPOINT_PREFIX,
    CHECKPOINTS,
    CONFIG,
    CONFIG_HISTORY,
    EVALUATION,
    EVENTS,
    HANGS,
    LOCK,
    METRICS,
    MODEL,
    PROFILES,
    SAMPLES,
    TENSORBOARD,
    TRACKERS,
    VALIDATION,
    VALIDATION_SAMPLES,
)
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.records.json_lines import drop_lines_from

log = get_logger(__name__)
LOCK_PATIENCE_S = 30.0
"""Seconds that a start waits for the ranks of an earlier start, which may just have been killed."""
KEPT_TOGETHER = (
    CHECKPOINTS,
    SAMPLES,
    METRICS,
    EVENTS,
    VALIDATION,
    VALIDATION_SAMPLES,
    TENSORBOARD,
    PROFILES,
    TRACKERS,
    MODEL,
    ADAPTER,
    BEST,
    CONFIG_HISTORY,
    EVALUATION,
)
"""What a run that starts from nothing moves aside together."""


def lock_directory(run_dir: Path) -> IO[str]:
    """Hold the run directory until the returned file is closed. Rank 0 calls it.

    The `deepspeed` launcher, when killed, leaves its ranks running: two starts would write one run.

    Raises:
        RunInUseError: another start of this run is still running.
        UsageError: the directory cannot be made or written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held = (run_dir / LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"run.dir={run_dir} cannot be created or written to: {error.strerror or error}",
            "everything that the run records goes there.",
            "choose a run.dir where you may write.",
        ) from None
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return held
        if time.monotonic() > deadline:
            held.close()
            raise RunInUseError(
                f"{run_dir} is in use by another start of this run",
                "both would write its checkpoints.",
                "end that one first, or set another run.dir.",
            )
        time.sleep(0.2)


def is_in_use(run_dir: Path) -> bool:
    """Whether a start holds the run directory now."""
    try:
        with (run_dir / LOCK).open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False
    return False


def prepare_directory(
    config: RunConfig, resume: Path | None, steps_done: int | None = None
) -> None:
    """Put away what this start does not continue, and write the resolved recipe. Rank 0 calls it.

    A start from nothing moves everything of an earlier run. A start from an older checkpoint moves
    the newer ones, so that the next `checkpoint.resume=auto` does not use them. A start from
    another run's checkpoint moves every checkpoint.

    Args:
        config: the recipe.
        resume: the checkpoint that is resumed.
        steps_done: steps that it contains; needed where its name does not say it.
    """
    run_dir = config.run.dir
    for name in (MODEL, ADAPTER, BEST):
        restore_folder(run_dir / name)
    everything = [path for name in KEPT_TOGETHER if _holds_something(path := run_dir / name)]
    stale = (
        everything
        if resume is None
        else _checkpoints_after(run_dir / CHECKPOINTS, resume, steps_done)
    )
    if stale:
        backup = move_aside(run_dir, stale)
        names = ", ".join(path.name for path in stale)
        log.info("%s: moved %s of an earlier start to %s/", run_dir, names, backup.name)
    (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
    write_atomic(run_dir / CONFIG, config.to_yaml())


def check_inputs_stay(config: RunConfig, resume: Path | None) -> None:
    """Refuse to read a model from a folder that this start would move aside.

    Raises:
        UsageError: `model.path` is the model of the run that would begin anew.
    """
    path = config.model.path
    if resume is not None or path is None:
        return
    for name in (MODEL, BEST):
        folder = config.run.dir / name
        if folder.is_dir() and path.is_dir() and path.samefile(folder):
            raise UsageError(
                f"model.path={path} is the {name}/ of run.dir={config.run.dir}, which starts anew",
                "what an earlier run left there is moved aside at the start.",
                "set another run.dir, or copy the model first.",
            )


def drop_repeated_lines(run_dir: Path, first_step: int) -> tuple[int, float]:
    """Remove what an earlier start recorded about steps that will be repeated. Rank 0 calls it.

    Returns:
        How many steps are repeated, and the seconds that they had taken.
    """
    dropped = drop_lines_from(run_dir / METRICS, first_step)
    for name in (VALIDATION, VALIDATION_SAMPLES):
        drop_lines_from(run_dir / name, first_step + 1, key="steps_done")
    seconds = [line.get("seconds") for line in dropped]
    return len(dropped), sum(float(s) for s in seconds if isinstance(s, int | float))


def move_aside(run_dir: Path, paths: Sequence[Path]) -> Path:
    """Move files and folders of the run to `before-<time>/`, which is returned.

    What was moved there in the same second stays.
    """
    backup = run_dir / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
    backup.mkdir(exist_ok=True)
    for path in paths:
        target = backup / path.name
        number = 2
        while target.exists():
            target = backup / f"{path.name}.{number}"
            number += 1
        path.rename(target)
    return backup


def move_hangs_aside(run_dir: Path) -> None:
    """Keep what an earlier start wrote about its hang, under another name.

    Another rank may do the same.
    """
    with contextlib.suppress(FileNotFoundError):
        kept = f"{HANGS}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        (run_dir / HANGS).rename(run_dir / kept)


def is_own(checkpoints: Path, resume: Path) -> bool:
    """Whether a checkpoint is one of this run's `checkpoints`, whatever path leads to it."""
    try:
        return resume.resolve().parent.samefile(checkpoints)
    except OSError:  # one of them does not exist
        return False


def _holds_something(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _checkpoints_after(checkpoints: Path, resume: Path, steps_done: int | None) -> list[Path]:
    """The checkpoints that do not precede `resume` in this run."""
    found = {
        int(number): path
        for path in checkpoints.glob(f"{CHECKPOINT_PREFIX}*")
        if (number := path.name.removeprefix(CHECKPOINT_PREFIX)).isdigit()
    }
    first = -1
    if is_own(checkpoints, resume):
        number = resume.resolve().name.removeprefix(CHECKPOINT_PREFIX)
        first = int(number) if number.isdigit() else steps_done or 0
    return [found[steps] for steps in sorted(found) if steps > first]
