"""Rollback: samples that a step went wrong over are excluded, and training returns to a checkpoint.

It happens within the process. Rank 0 records the excluded samples before anything is undone, so
that they keep their places with zero weight whatever happens later.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.run_files import CHECKPOINTS
from onellm_dist.train.checkpoint.files import find_damage
from onellm_dist.train.checkpoint.folder import (
    get_file_records,
    get_steps_done,
    list_checkpoints,
    make_checkpoint_name,
    read_manifest,
)
from onellm_dist.train.checkpoint.state import load_state
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.run_directory import move_aside
from onellm_dist.train.stability.offending_samples import format_samples, to_event_fields
from onellm_dist.train.stability.policy import RollbackError

if TYPE_CHECKING:
    from onellm_dist.train.trainer import Trainer


def roll_back(trainer: Trainer, error: RollbackError) -> None:
    """Exclude the samples, load the latest good checkpoint, and continue at its step.

    All ranks call it together.

    Raises:
        OneLLMError: there were too many rollbacks, nothing is left to exclude, or there is no
            checkpoint.
    """
    trainer.checkpoints.wait()
    step, anomaly, offending = error.step, error.anomaly, error.offending
    samples = trainer.sample_log
    check_rollbacks_left(
        error, done=samples.excluded.rollbacks, allowed=trainer.config.stability.max_rollbacks
    )
    folder = find_good_checkpoint(trainer.config.run.dir, trainer.dist, trainer.events)
    excluded = samples.exclude(step, anomaly.reason, [s.sample for s in offending])
    trainer.dist.barrier()  # rank 0 has written them
    if not excluded:
        raise OneLLMError(
            f"step {step}: {anomaly.reason}, and every offending sample is excluded already",
            "the data is not the cause: another rollback would lead here again.",
            "lower optim.lr, or start from an older checkpoint (checkpoint.resume=.../step-...).",
        )
    manifest = load_state(folder, trainer.engine, trainer.dist)
    trainer.continue_at(get_steps_done(manifest), manifest.get("stability", {}))
    trainer.callbacks.on_rollback(step)
    trainer.events.write(
        "rollback",
        step=step,
        first_step=trainer.state.first_step,
        lost_steps=step - trainer.state.first_step,
        lost_seconds=round(trainer.state.lost_seconds, 3),
        reason=anomaly.reason,
        anomaly=anomaly.kind,
        excluded=excluded,
        number=samples.excluded.rollbacks,
        **to_event_fields(offending),
        message=f"step {step}: {anomaly.reason}: back to {folder.name}, without {excluded} "
        f"samples: {format_samples(offending)}",
    )


def check_rollbacks_left(error: RollbackError, *, done: int, allowed: int) -> None:
    """Refuse one rollback too many.

    Args:
        error: why there should be one.
        done: rollbacks of the run so far.
        allowed: `stability.max_rollbacks`.

    Raises:
        OneLLMError: `allowed` were done.
    """
    if done >= allowed:
        raise OneLLMError(
            f"step {error.step}: {error.anomaly.reason}; the run was rolled back "
            f"{format_count(done, 'time')}, "
            f"and stability.max_rollbacks is {allowed}",
            f"the offending samples now: {format_samples(error.offending)}.",
            "see events.jsonl; lower optim.lr, repair the data, or raise stability.max_rollbacks.",
        )


def find_good_checkpoint(run_dir: Path, dist: Distributed, events: Events) -> Path:
    """The latest checkpoint whose files have their checksums.

    Damaged ones are moved to `before-.../`, as at a start. All ranks call it together.

    Raises:
        OneLLMError: there is none.
    """
    root = run_dir / CHECKPOINTS

    def list_complete() -> list[Path]:
        return [f for f in reversed(list_checkpoints(root)) if read_manifest(f) is not None]

    for folder in dist.ask_rank_zero(list_complete):
        manifest: dict[str, Any] = read_manifest(folder) or {}
        problems = find_damage(get_file_records(folder, manifest), dist)
        if not problems:
            return folder
        if dist.is_rank_zero:  # it must not count among those that stay, nor be used again
            move_aside(run_dir, [folder])
        events.write(
            "checkpoint_damaged",
            folder=folder.name,
            problems=problems,
            message=f"{folder} is damaged, and moved aside: {problems[0]}",
            warning=True,
        )
    raise OneLLMError(
        f"{root} has no complete checkpoint to return to",
        "the step that went wrong cannot be undone.",
        "set stability.policy=skip, or start a new run.",
    )


def needs_first_checkpoint(policy: str, run_dir: Path, first_step: int, dist: Distributed) -> bool:
    """Whether a checkpoint must be written before the first step, so that a rollback has one.

    A start from nothing has none yet; a start from another run's checkpoint has it there, not here.
    All ranks call it together.

    Args:
        policy: `stability.policy`.
        run_dir: the run directory.
        first_step: index of the first step of this start.
        dist: the ranks.
    """
    if policy != "rollback":
        return False
    own = run_dir / CHECKPOINTS / make_checkpoint_name(first_step)
    return dist.ask_rank_zero(lambda: read_manifest(own) is None)
