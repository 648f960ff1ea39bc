"""The training loop. Everything it needs was built before (build.py); every rank runs the same lines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from onellm_dist.data.microstep import MicroStep
from onellm_dist.packed import PackedBatch
from onellm_dist.train.build import Run
from onellm_dist.train.engine.base import StepResult
from onellm_dist.train.metrics import StepReport
from onellm_dist.train.schedule import learning_rate
from onellm_dist.train.totals import StepTotals, StepValues

MicroBatches = Iterator[tuple[MicroStep, PackedBatch]]


@dataclass(frozen=True)
class Outcome:
    """How a run ended that did not fail: `done` or `preempted`, and why."""

    status: str
    reason: str


@dataclass(frozen=True)
class _Pass:
    """What one rank did in a step before the optimizer."""

    totals: StepTotals
    batches: list[PackedBatch]
    """The micro-batches, without their media."""
    losses: list[torch.Tensor]
    waited: float
    """Seconds spent waiting for the loader."""


def train(run: Run) -> Outcome:
    """Run every step that is left, then export the model."""
    steps = run.config.train.steps
    with run.loader as loader:
        micro_batches = iter(loader)
        for step in range(run.first_step, steps):
            run.compare_plans(step)
            run.profiler.begin(step)
            values, result = _step(run, step, micro_batches)
            run.profiler.end(step)
            run.exit_file.step = step + 1
            run.guard.after_step(step, applied=result.applied, new_tombstones=values.new_tombstones)
            preempted = values.stop and step + 1 < steps
            if run.validation is not None and run.validation.due(step + 1) and not preempted:
                run.validation.run(step + 1)
            if preempted or (step + 1) % run.config.checkpoint.every == 0 or step + 1 == steps:
                started = time.perf_counter()
                run.checkpoint(step + 1)
                run.telemetry.stalled += time.perf_counter() - started
            if preempted:
                return Outcome("preempted", run.stop_reason())
    run.export()
    return Outcome("done", f"{steps} steps")


def _step(run: Run, step: int, micro_batches: MicroBatches) -> tuple[StepValues, StepResult]:
    started = time.perf_counter()
    done = _forward_backward(run, step, micro_batches)
    # The record of tombstones is on the disk of every rank before any rank can apply the step: the sum waits for all.
    new_tombstones = run.ledger.record(step, done.batches)
    done.totals.reduce(run.world, new_tombstones=new_tombstones, stop=run.stop.asked())
    lr = learning_rate(step, run.config.optim, run.config.train.steps)
    result = run.engine.step(lr)
    values = done.totals.read()
    if values.not_finite or not result.applied:
        _tell_skipped(run, step, done, values)
    if values.new_tombstones:
        run.events.write("tombstones", step=step, count=values.new_tombstones, total=run.guard.tombstones + values.new_tombstones)
    run.metrics.write(_report(run, step, lr, values, result, time.perf_counter() - started, done.waited))
    return values, result


def _forward_backward(run: Run, step: int, micro_batches: MicroBatches) -> _Pass:
    done = _Pass(run.new_totals(), [], [], 0.0)
    waited = 0.0
    while True:
        asked = time.perf_counter()
        micro, batch = next(micro_batches)
        waited += time.perf_counter() - asked
        if micro.step != step:
            raise RuntimeError(f"the loader gave a micro-step of step {micro.step} in step {step}")
        batch = batch.to(run.world.device)
        loss, nll, sample_index = run.engine.forward(batch, last=micro.last)
        run.engine.backward(loss, micro.divisor)
        done.totals.add(batch, loss, nll, sample_index)
        done.batches.append(replace(batch, values={}))
        done.losses.append(loss.detach())
        if micro.last:
            return _Pass(done.totals, done.batches, done.losses, waited)


def _tell_skipped(run: Run, step: int, done: _Pass, values: StepValues) -> None:
    """An event that names the samples whose loss was not finite, on whichever rank."""
    own = [batch.sample_ids for batch, loss in zip(done.batches, done.losses, strict=True) if not math.isfinite(loss.item())]
    culprits = [{"rank": rank, "samples": list(ids)} for rank, found in enumerate(run.world.gather(own)) for ids in found]
    reason = f"loss not finite in {values.not_finite} micro-steps" if culprits else "gradient not finite, every loss finite"
    run.events.write(
        "step_skipped", say=f"step {step} skipped on all ranks: {reason} (see events.jsonl)", step=step, reason=reason, micro_steps=culprits
    )


def _report(run: Run, step: int, lr: float, values: StepValues, result: StepResult, seconds: float, waited: float) -> StepReport:
    size = run.size_of(step)
    readings = run.telemetry.read(step)
    return StepReport(
        step=step, loss=values.loss / size.divisor, loss_by_modality=values.nll, lr=lr, grad_norm=result.grad_norm, applied=result.applied,
        samples=size.samples, supervised_tokens=size.supervised_tokens, tokens=size.tokens, padding_fraction=size.padding_fraction,
        tokens_per_second=size.tokens / seconds, data_wait_fraction=min(1.0, waited / seconds),
        mfu=None if run.peak is None else size.flops / seconds / (run.world.size * run.peak),
        sample_digest=run.plan.digest(step) if run.world.main else "", seconds=seconds, pack_balance=size.balance,
        **readings._asdict(),
    )  # fmt: skip
