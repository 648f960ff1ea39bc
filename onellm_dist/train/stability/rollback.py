"""Going back: the samples that a step went wrong over become skipped_samples, and the loop goes on from the last good checkpoint, in-process.

`ledger/skipped_samples-ranks-guard.jsonl`: one object a sample, `step` (which went wrong), `sample_id`, `reason`, `rollback` (its number in
the run). Rank 0 writes it before anything is undone; every start reads it back, so that the samples keep their places with zero weight
whatever happens later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import repair_last_line
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
from onellm_dist.train.records.run_directory import CHECKPOINTS, move_aside
from onellm_dist.train.records.skipped_samples import MARKS
from onellm_dist.train.stability.checks import Verdict
from onellm_dist.train.stability.offending_samples import Suspect, describe, say

if TYPE_CHECKING:
    from onellm_dist.train.setup import Run


class RollBackError(Exception):
    """The step must be undone; every rank raises it together."""

    def __init__(self, step: int, verdict: Verdict, culprits: Sequence[Suspect]) -> None:
        super().__init__(f"step {step}: {verdict.reason}")
        self.step, self.verdict, self.culprits = step, verdict, culprits


class Marks:
    """Samples that the guard took out of the run, from every earlier start.

    Args:
        main: this is rank 0, which writes.
    """

    def __init__(self, folder: Path, *, main: bool) -> None:
        self._path = folder / MARKS
        if main:
            repair_last_line(self._path)
        self.known: dict[str, str] = {}
        """Sample id (with its epoch) -> reason."""
        self.rollbacks = 0
        """Of the whole run."""
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
            self.known[entry["sample_id"]] = entry["reason"]
            self.rollbacks = max(self.rollbacks, int(entry["rollback"]))
        except (
            json.JSONDecodeError,
            KeyError,
            TypeError,
        ):  # cut short by a kill: nothing was undone by it yet
            return

    def add(
        self, step: int, verdict: Verdict, culprits: Sequence[Suspect], dist: Distributed
    ) -> int:
        """Mark samples durably; returns how many are new. Called by all ranks together."""
        new = [s for s in culprits if s.sample not in self.known]
        self.rollbacks += 1
        reasons = {s.sample: f"guard: {verdict.reason}, in step {step}" for s in new}
        if dist.is_rank_zero and new:
            with self._path.open("a", encoding="utf-8") as out:
                out.writelines(
                    json.dumps(
                        {
                            "step": step,
                            "sample_id": name,
                            "reason": reason,
                            "rollback": self.rollbacks,
                        }
                    )
                    + "\n"
                    for name, reason in reasons.items()
                )
                out.flush()
                os.fsync(out.fileno())
        self.known.update(reasons)
        dist.barrier()
        return len(new)


def roll_back(run: Run, back: RollBackError) -> None:
    """Mark, load the last good checkpoint, and set the run's loader, metrics and guard to its step. Called by all ranks together.

    Raises:
        OneLLMError: too many roll-backs, nothing left to mark, or no checkpoint.
    """
    run.checkpoints.wait()
    allowed = run.config.stability.max_rollbacks
    if run.marks.rollbacks >= allowed:
        raise OneLLMError(
            f"step {back.step}: {back.verdict.reason}; rolled back {run.marks.rollbacks} times, stability.max_rollbacks is {allowed}",
            f"the samples to blame now: {say(back.culprits)}.",
            "look at events.jsonl; lower optim.lr, repair the data, or raise stability.max_rollbacks.",
        )
    folder = last_good(run)
    marked = run.marks.add(back.step, back.verdict, back.culprits, run.dist)
    if not marked:
        raise OneLLMError(
            f"step {back.step}: {back.verdict.reason}, with every sample to blame taken out already",
            "it is not the data: going back once more would come here again.",
            "lower optim.lr or start from an older checkpoint (checkpoint.resume=.../step-...).",
        )
    run.ledger.known.update(run.marks.known)
    manifest = load_state(folder, run.engine, run.dist)
    run.restart_at(get_steps_done(manifest), manifest.get("guard", {}))
    run.events.write(
        "rollback",
        step=back.step,
        to=run.first_step,
        lost_steps=back.step - run.first_step,
        lost_seconds=round(run.metrics.lost_seconds, 3),
        reason=back.verdict.reason,
        kind=back.verdict.kind,
        marked=marked,
        number=run.marks.rollbacks,
        **describe(back.culprits),
        say=f"step {back.step}: {back.verdict.reason}: back to {folder.name}, without {marked} samples: {say(back.culprits)}",
    )


def last_good(run: Run) -> Path:
    """The newest checkpoint whose files have their checksums; damaged ones are moved to `before-.../`, as a start does."""
    root = run.config.run.dir / CHECKPOINTS
    candidates = run.dist.broadcast(
        [f for f in reversed(list_checkpoints(root)) if read_manifest(f) is not None]
        if run.dist.is_rank_zero
        else []
    )
    for folder in candidates:
        manifest = read_manifest(folder) or {}
        problems = find_damage(get_file_records(folder, manifest), run.dist)
        if not problems:
            return folder
        if run.dist.is_rank_zero:  # it must not count among those that stay, nor be taken again
            move_aside(run.config.run.dir, [folder])
        run.events.write(
            "checkpoint_damaged",
            folder=folder.name,
            problems=problems,
            say=f"WARNING: {folder} is damaged, and moved aside: {problems[0]}",
        )
    raise OneLLMError(
        f"{root} has no whole checkpoint to go back to",
        "the step that went wrong cannot be undone.",
        "take stability.policy=skip, or start anew.",
    )


def needs_a_start(run: Run) -> bool:
    """Whether a checkpoint must be written before the first step, to have something to go back to. Called by all ranks together.

    A start from nothing has none yet; one from another run's checkpoint has it there, not here.
    """
    if run.guard.policy != "rollback":
        return False
    own = run.config.run.dir / CHECKPOINTS / make_checkpoint_name(run.first_step)
    return run.dist.broadcast(read_manifest(own) is None if run.dist.is_rank_zero else True)
