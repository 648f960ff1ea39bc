"""The training loop. Everything it needs was built before (build.py); every rank runs the same lines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from onellm_dist.common.errors import OneLLMError
from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.packed import PackedBatch
from onellm_dist.train.engine.base import GradNorms
from onellm_dist.train.optim.schedules import compute_learning_rate
from onellm_dist.train.records.metrics import StepReport
from onellm_dist.train.setup import Run
from onellm_dist.train.stability.checks import Verdict
from onellm_dist.train.stability.offending_samples import (
    Part,
    Suspect,
    describe,
    find_culprits,
    say,
)
from onellm_dist.train.stability.rollback import RollBackError, needs_a_start, roll_back
from onellm_dist.train.totals import StepTotals, StepValues

MicroBatches = Iterator[tuple[MicroBatch, PackedBatch]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended that did not fail: `done` or `preempted`, and why."""

    status: str
    reason: str


@dataclass
class _Pass:
    """What one rank did in a step before the ranks agree on it."""

    totals: StepTotals
    parts: list[Part] = field(default_factory=list)
    waited: float = 0.0
    """Seconds spent waiting for the loader."""


def train(run: Run) -> Outcome:
    """Run every step that is left, going back where the guard says so, then export the model."""
    if needs_a_start(run):
        run.checkpoints.save(run.first_step)
    while True:
        try:
            outcome = _train(run)
            break
        except RollBackError as back:
            run.in_flight.rest("checkpoint")
            roll_back(run, back)
    run.in_flight.rest("checkpoint")
    run.checkpoints.wait()
    if outcome.status == "done":
        run.in_flight.rest("export")
        run.export()
    return outcome


def _train(run: Run) -> Outcome:
    steps = run.config.train.steps
    with run.loader as loader:
        micro_batches = iter(loader)
        for step in range(run.first_step, steps):
            run.in_flight.beat("plan", step=step)
            run.compare_plans(step)
            run.profiler.begin(step)
            values, applied = _step(run, step, micro_batches)
            run.profiler.end(step)
            run.exit_file.step = step + 1
            run.in_flight.first_step_done = True
            run.guard.count(step, applied=applied, new_skipped_samples=values.new_skipped_samples)
            run.in_flight.rest("end")  # a failure from here on is none of this step's samples
            if _end_of_step(run, step + 1, values):
                return Outcome("preempted", run.stop_reason())
    return Outcome("done", f"{steps} steps")


def _end_of_step(run: Run, done: int, values: StepValues) -> bool:
    """Validation and checkpoint, where they are due after `done` steps. Returns whether the run stops here."""
    steps = run.config.train.steps
    if values.write_failed:
        run.checkpoints.wait()  # raises on every rank
    preempted = values.stop and done < steps
    if run.validation is not None and run.validation.due(done) and not preempted:
        run.in_flight.rest("validation")
        run.note_validation(done, run.validation.run(done))
    last = preempted or done == steps
    if last or done % run.config.checkpoint.every == 0 or values.save:
        run.in_flight.rest("checkpoint")
        run.checkpoints.save(done, wait=last)
        run.telemetry.stalled += run.checkpoints.stall_seconds
    return preempted


def _step(run: Run, step: int, micro_batches: MicroBatches) -> tuple[StepValues, bool]:
    """One optimizer step; whether it was applied.

    Raises:
        RollBackError, OneLLMError: by the guard's policy.
    """
    started = time.perf_counter()
    done = _forward_backward(run, step, micro_batches)
    run.in_flight.beat("agree")
    values, norms = _agree(run, step, done), run.engine.grad_norms()
    loss = values.loss / run.plan.step(step, run.dist.world_size).global_valid_tokens
    verdict = run.guard.judge(math.nan if values.not_finite else loss, norms.total)
    run.in_flight.beat("step")
    lr = compute_learning_rate(step, run.config.optim, run.config.train.steps)
    applied = run.engine.step(lr, discard=verdict is not None)
    if applied:
        run.guard.keep(loss, norms.total)
    else:
        _throw_away(
            run,
            step,
            done,
            verdict
            or Verdict("gradient_not_finite", "the engine found a gradient that is not finite"),
        )
    if values.new_skipped_samples:
        run.events.write(
            "skipped_samples",
            step=step,
            count=values.new_skipped_samples,
            total=run.guard.skipped_samples + values.new_skipped_samples,
        )
    seconds = time.perf_counter() - started
    run.metrics.write(_report(run, step, lr, values, norms, applied, seconds, done.waited))
    run.phases.first_step(seconds, done.waited, run.events)
    return values, applied


def _forward_backward(run: Run, step: int, micro_batches: MicroBatches) -> _Pass:
    done = _Pass(run.new_totals())
    for planned in run.plan.step(step, run.dist.world_size).ranks[run.dist.rank]:
        run.in_flight.beat("data", micro=planned)
        asked = time.perf_counter()
        micro, batch = next(micro_batches)
        done.waited += time.perf_counter() - asked
        if (micro.step, micro.index) != (step, planned.index):
            raise RuntimeError(
                f"the loader gave micro-step {micro.index} of step {micro.step} for {planned.index} of step {step}"
            )
        run.in_flight.beat("forward")
        batch = batch.to(run.dist.device)
        loss, nll, sample_index = run.engine.forward(batch, last=micro.last)
        done.totals.add(batch, loss, nll, sample_index)
        done.parts.append(Part(replace(batch, values={}), loss.detach(), nll, sample_index))
        run.in_flight.beat("backward")
        run.engine.backward(loss, micro.global_valid_tokens)
    if not done.parts:
        raise RuntimeError(f"the plan has no micro-step in step {step}")
    return done


def _agree(run: Run, step: int, done: _Pass) -> StepValues:
    """The sums over all ranks, while nothing is applied yet.

    The record of skipped_samples is on the disk of every rank before any rank can apply the step: the sum waits for all.
    """
    new_skipped_samples = run.ledger.record(step, [part.batch for part in done.parts])
    done.totals.reduce(
        run.dist,
        new_skipped_samples=new_skipped_samples,
        stop=run.stop.asked(),
        write_failed=run.checkpoints.failed,
        save=run.checkpoints.is_overdue,
    )
    return done.totals.read()


def _throw_away(run: Run, step: int, done: _Pass, verdict: Verdict) -> None:
    """Name the samples, and do what the policy says about a step that went wrong and was not applied."""
    culprits = find_culprits(done.parts, verdict, run.dist)
    policy = run.guard.policy
    if policy == "rollback":
        raise RollBackError(step, verdict, culprits)
    if policy == "stop":
        run.events.write(
            "guard_stop", step=step, reason=verdict.reason, kind=verdict.kind, **describe(culprits)
        )
        raise OneLLMError(
            f"step {step}: {verdict.reason}; the samples: {say(culprits)}",
            "stability.policy is stop: the step was not applied.",
            "see events.jsonl for the samples; take stability.policy=skip or rollback to go on without them.",
        )
    _tell_skipped(run, step, verdict, culprits)


def _tell_skipped(run: Run, step: int, verdict: Verdict, culprits: list[Suspect]) -> None:
    packs: dict[tuple[int, int], list[str]] = {}
    for suspect in culprits:
        packs.setdefault((suspect.rank, suspect.micro_batch), []).append(suspect.sample)
    run.events.write(
        "step_skipped",
        step=step,
        reason=verdict.reason,
        kind=verdict.kind,
        micro_batches=[
            {"rank": rank, "micro_batch": index, "samples": names}
            for (rank, index), names in packs.items()
        ],
        **describe(culprits),
        say=f"step {step} skipped on all ranks: {verdict.reason}: {say(culprits)}",
    )


def _report(
    run: Run,
    step: int,
    lr: float,
    values: StepValues,
    norms: GradNorms,
    applied: bool,
    seconds: float,
    waited: float,
) -> StepReport:
    size = run.size_of(step)
    readings = run.telemetry.read(step)
    return StepReport(
        step=step,
        loss=values.loss / size.global_valid_tokens,
        loss_by_modality=values.nll,
        lr=lr,
        grad_norm=norms.total,
        grad_norm_by_part=norms.by_part,
        applied=applied,
        samples=size.samples,
        supervised_tokens=size.supervised_tokens,
        tokens=size.tokens,
        padding_fraction=size.padding_fraction,
        tokens_per_second=size.tokens / seconds,
        data_wait_fraction=min(1.0, waited / seconds),
        mfu=None if run.peak is None else size.flops / seconds / (run.dist.world_size * run.peak),
        sample_digest=run.plan.digest(step) if run.dist.is_rank_zero else "",
        seconds=seconds,
        pack_balance=size.balance,
        **readings._asdict(),
    )
