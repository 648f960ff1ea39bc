"""The trainer: `Trainer.from_config(config).fit()` trains a recipe and returns an outcome."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.epochs import resolve_epochs
from onellm_dist.data.micro_batch import StepPlan
from onellm_dist.data.plan import Plan
from onellm_dist.launch.ranks import Ranks
from onellm_dist.train.assemble import assemble_trainer
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.callbacks.callback_list import CallbackList
from onellm_dist.train.callbacks.early_stopping import EarlyStopping
from onellm_dist.train.callbacks.preemption import Preemption
from onellm_dist.train.checkpoint.writer import Checkpoints
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.export.run import export_run
from onellm_dist.train.heartbeat import Heartbeat
from onellm_dist.train.optim.groups import compute_group_rates
from onellm_dist.train.optim.rules import ParameterRate
from onellm_dist.train.optim.schedules import compute_learning_rate
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.run_directory import drop_repeated_lines
from onellm_dist.train.records.sample_log import SampleLog
from onellm_dist.train.recovery import needs_first_checkpoint, roll_back
from onellm_dist.train.stability.monitor import Anomaly, StabilityMonitor
from onellm_dist.train.stability.offending_samples import MicroBatchLosses, find_offending_samples
from onellm_dist.train.stability.policy import RollbackError, apply_policy
from onellm_dist.train.stability.unreadable import UnreadableSamples, check_supervision
from onellm_dist.train.start.pack_budget import PackBudget, lower_budgets
from onellm_dist.train.start.session import ProcessContext, Session
from onellm_dist.train.state import Outcome, TrainState
from onellm_dist.train.step.micro_batches import MicroBatchStream
from onellm_dist.train.step.rank_time import RankTime
from onellm_dist.train.step.values import Decision, LocalPass, StepMeter, compare_plans, work_ahead
from onellm_dist.train.totals import StepTotals, StepValues

COMPARE_EVERY = 50
"""Steps between two comparisons of the plan across ranks."""


@dataclass(kw_only=True)
class Trainer:
    """Trains a recipe. Build it with `from_config`; every rank runs the same lines.

    Attributes:
        config: the recipe.
        session: process group, watchdog, lock and exit file of this start.
        plan: which samples each rank processes in each step.
        engine: holds the sharded model and the optimizer.
        model: the transformers model inside the engine.
        processor: the processor of the model.
        state: the progress of the run.
        monitor: checks every step.
        sample_log: which samples are left out.
        checkpoints: writes checkpoints.
        events: `events.jsonl`.
        callbacks: what looks at the run.
        preemption: whether the run was asked to stop.
        meter: collects the metrics of each step.
        rates: how each of the engine's parameter groups trains.
        early_stopping: knows whether the validation loss has stopped falling.
        budget: token budgets that were found at the start; None: the recipe has numbers.
    """

    config: RunConfig
    session: Session
    plan: Plan
    engine: Engine
    model: Any
    processor: Any
    state: TrainState
    monitor: StabilityMonitor
    sample_log: SampleLog
    checkpoints: Checkpoints
    events: Events
    callbacks: CallbackList
    preemption: Preemption
    meter: StepMeter
    rates: Sequence[ParameterRate]
    early_stopping: EarlyStopping
    budget: PackBudget | None = None

    def __post_init__(self) -> None:
        self._micro_batches = MicroBatchStream(
            self.plan, self.dist, steps=self.config.train.steps, left_out=self.sample_log.left_out
        )
        self._time = RankTime(self.model, self.dist.device)
        self._combinations = self.plan.corpus.combinations
        self._unreadable = UnreadableSamples(self.config.stability.max_skipped)
        for callback in self.callbacks:
            self.meter.metrics.add(callback.metrics)
        self.callbacks.attach(self)

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        *,
        ranks: Ranks | None = None,
        callbacks: Sequence[Callback] = (),
        process: ProcessContext | None = None,
    ) -> Trainer:
        """Build a run. All ranks call it together.

        Args:
            config: the recipe (`onellm_dist.load_config`).
            ranks: this process's place among the ranks; default: what the launcher's environment
                variables say, else one rank.
            callbacks: callbacks beside those of the recipe.
            process: given by a process that does nothing but train; default: the calling process
                is never ended.

        Raises:
            UsageError: the recipe asks for something that does not exist or is not possible.
        """
        session = Session(config := resolve_epochs(config), ranks=ranks, process=process)
        try:
            return assemble_trainer(cls, config, session=session, callbacks=callbacks)
        except BaseException as error:
            session.exit_file.write_failure(error)
            if session.end_process is None:
                session.close()
            raise

    def begin_at(self, first_step: int) -> None:
        """Make `first_step` the next step; records of it and of later ones are dropped."""
        lost_steps, lost_seconds = 0, 0.0
        if self.dist.is_rank_zero:
            lost_steps, lost_seconds = drop_repeated_lines(self.config.run.dir, first_step)
        self.state.begin(first_step, lost_steps=lost_steps, lost_seconds=lost_seconds)
        self.heartbeat.steps_done = first_step
        self.sample_log.begin(first_step)

    def continue_at(self, first_step: int, stability: Mapping[str, Any]) -> None:
        """Continue at an earlier step, whose state the engine has. All ranks call it together.

        Args:
            first_step: index of the next step.
            stability: the monitor's state at that step.
        """
        self._micro_batches.close()
        self.begin_at(first_step)
        self.monitor.restore(stability)

    @property
    def dist(self) -> Distributed:
        """The ranks of the run."""
        return self.session.dist

    @property
    def heartbeat(self) -> Heartbeat:
        """What this rank is doing."""
        return self.session.heartbeat

    def fit(self) -> Outcome:
        """Train until the run is done or asked to stop, and release everything it holds.

        Raises:
            OneLLMError: the run failed; `exit.json` says why.
        """
        try:
            with lower_budgets(self):
                outcome = self._fit()
        except BaseException as error:
            self.session.exit_file.write_failure(error)
            if self.session.end_process is None:
                self.checkpoints.drain()
                self.close()
            raise
        self.close()
        return outcome

    def close(self) -> None:
        """Release loader workers, files, signal handlers, watchdog, lock and process group."""
        self._micro_batches.close()
        self.session.close()

    def record_metric(self, name: str, value: Any) -> None:
        """Record a metric of the step under way.

        Metrics whose reduction is `sum`, `mean` or `max` must be recorded before the step is
        reduced (by `after_forward_backward` at the latest).

        Args:
            name: a metric of the package, or of a callback's `metrics`.
            value: its value; on this rank, where it is reduced.

        Raises:
            KeyError: no metric has this name.
        """
        self.meter.record(name, value)

    def _fit(self) -> Outcome:
        self._write_first_checkpoint()
        self.callbacks.on_fit_start()
        while True:
            try:
                outcome = self._train()
                break
            except RollbackError as error:
                self.heartbeat.leave_step("checkpoint")
                roll_back(self, error)
            finally:
                self._micro_batches.close()
        self.heartbeat.leave_step("checkpoint")
        self.checkpoints.wait()
        if outcome.status == "done":
            self.heartbeat.leave_step("export")
            export_run(self)
        self._finish(outcome)
        return outcome

    def _train(self) -> Outcome:
        while self.state.step < self.config.train.steps and self.early_stopping.reason is None:
            if self._end_step(self.train_step()):
                return self._end("preempted", self._find_stop_reason())
        steps = format_count(self.state.step, "step")
        return self._end("done", self.early_stopping.reason or steps)

    def _end(self, status: str, reason: str) -> Outcome:
        return Outcome(status, reason, self.state.steps_done, self.config.run.dir)

    def _end_step(self, values: StepValues) -> bool:
        """Do what is due between two steps; return whether the run stops here."""
        steps_done, steps = self.state.steps_done, self.config.train.steps
        if values.checkpoint_failed:
            self.checkpoints.wait()  # raises on every rank
        stopping = values.stop and steps_done < steps
        self.callbacks.after_step(steps_done, stopping=stopping)
        last = stopping or steps_done == steps or self.early_stopping.reason is not None
        if last or steps_done % self.config.checkpoint.every == 0 or values.checkpoint_due:
            self.heartbeat.leave_step("checkpoint")
            self.checkpoints.save(steps_done, wait=last)
            self.callbacks.on_checkpoint(steps_done, self.checkpoints.stall_seconds)
        return stopping

    def train_step(self) -> StepValues:
        """Run the next optimizer step. All ranks call it together.

        Returns:
            The reduced values of the step.

        Raises:
            RollbackError: the step went wrong, and `stability.policy` is `rollback`.
            OneLLMError: the step went wrong, and `stability.policy` is `stop`; or too many steps
                or samples were skipped.
        """
        self.heartbeat.enter("plan", step=(step := self.state.step))
        plan = self.plan.step(step, self.dist.world_size)
        check_supervision(plan, self.config.data.max_text_tokens)
        if step == self.state.first_step or step % COMPARE_EVERY == 0:
            compare_plans(plan, self.dist)
        self.callbacks.on_step_start(step)
        local = self._forward_backward(plan)
        values = self._reduce(plan, local)
        decision = self._decide(plan, values)
        applied = self._apply(plan, decision, local)
        self._report(plan, values, decision, local, applied=applied)
        self.callbacks.on_step_end(step)
        self._count(step, values, applied=applied)
        return values

    def _forward_backward(self, plan: StepPlan) -> LocalPass:
        """Run this rank's micro-batches of a step; gradients accumulate in the engine."""
        self._time.begin(plan.step)
        self.callbacks.before_forward_backward(plan.step)
        local = LocalPass(StepTotals(self._combinations, self.dist, self.meter.metrics.reduced))
        for planned in plan.ranks[self.dist.rank]:
            self.heartbeat.enter("data", micro_batch=planned)
            asked = time.perf_counter()
            batch = self._micro_batches.next(planned)
            local.data_wait_seconds += time.perf_counter() - asked
            self.heartbeat.enter("forward")
            batch = batch.to(self.dist.device)
            with self._time.run_forward():
                found = self.engine.forward(batch, last=planned.last)
            local.totals.add(batch, *found)
            without_media, loss = replace(batch, values={}), found[0]
            local.losses.append(MicroBatchLosses(without_media, loss.detach(), *found[1:3]))
            self.heartbeat.enter("backward")
            with self._time.run_pass():
                self.engine.backward(loss, plan.loss_count)
        if not local.losses:
            raise RuntimeError(f"the plan has no micro-batch in step {plan.step}")
        self.callbacks.after_forward_backward(plan.step)
        return local

    def _reduce(self, plan: StepPlan, local: LocalPass) -> StepValues:
        """The one reduction over ranks; nothing is applied yet.

        The skipped samples of every rank are on its disk before any rank can apply the step: the
        sum waits for all of them.
        """
        self.heartbeat.enter("reduce")
        new_skipped_samples = self.sample_log.record_step(plan.step, local.skipped_samples)
        local.totals.reduce(
            new_skipped_samples=new_skipped_samples,
            unreadable=local.count_modalities(self.sample_log.new_unreadable),
            stop=self.preemption.is_requested(),
            checkpoint_failed=self.checkpoints.failed,
            checkpoint_due=self.checkpoints.is_overdue,
            metrics={
                **self.meter.get_reduced(),
                **self.callbacks.metrics_to_reduce(plan.step),
            },
            rank_seconds=self._time.end(local.data_wait_seconds),
        )
        steps = self.config.train.steps
        local.sample_digest = work_ahead(self.plan, plan.step, steps, self.dist)
        return local.totals.read()

    def _decide(self, plan: StepPlan, values: StepValues) -> Decision:
        """Decide about the step, from values that are equal on every rank."""
        norms = self.engine.grad_norms()
        loss = values.loss / plan.loss_count
        self._unreadable.check(plan, values, self.sample_log.new_unreadable, self.dist)
        anomaly = self.monitor.check(math.nan if values.not_finite else loss, norms.total)
        schedule = plan.step, self.config.optim, self.config.train.steps
        rates = compute_group_rates(*schedule, self.rates)
        return Decision(loss, norms, compute_learning_rate(*schedule), rates, anomaly)

    def _apply(self, plan: StepPlan, decision: Decision, local: LocalPass) -> bool:
        """Apply the step, or discard it and do what `stability.policy` says."""
        self.heartbeat.enter("apply")
        applied = self.engine.step(decision.rates, discard=decision.anomaly is not None)
        if applied:
            self.monitor.accept(decision.loss, decision.norms.total)
            return True
        anomaly = decision.anomaly or Anomaly(
            "gradient_not_finite", "the engine found a gradient that is not finite"
        )
        offending = find_offending_samples(local.losses, anomaly, self.dist)
        apply_policy(self.monitor.policy, plan.step, anomaly, offending, self.events)
        return False

    def _report(
        self,
        plan: StepPlan,
        values: StepValues,
        decision: Decision,
        local: LocalPass,
        *,
        applied: bool,
    ) -> None:
        if values.new_skipped_samples:
            self.events.write(
                "skipped_samples",
                step=plan.step,
                count=values.new_skipped_samples,
                total=self.monitor.skipped_samples + values.new_skipped_samples,
            )
        metrics = self.meter.measure(plan, values, decision, local, applied=applied)
        if local.sample_digest is not None:
            metrics.record("sample_digest", local.sample_digest)
        for name, value in self.callbacks.metrics_to_record(plan.step).items():
            metrics.record(name, value)
        self.callbacks.on_metrics(metrics)

    def _count(self, step: int, values: StepValues, *, applied: bool) -> None:
        # From here on a failure concerns no sample.
        self.state.steps_done = step + 1
        self.heartbeat.steps_done = step + 1
        self.heartbeat.first_step_done = True
        self.monitor.count_step(
            step, applied=applied, new_skipped_samples=values.new_skipped_samples
        )
        self.heartbeat.leave_step("end")

    def _write_first_checkpoint(self) -> None:
        """Write a checkpoint before the first step, where a rollback would have none."""
        first_step = self.state.first_step
        if needs_first_checkpoint(self.monitor.policy, self.config.run.dir, first_step, self.dist):
            self.checkpoints.save(first_step)

    def _find_stop_reason(self) -> str:
        """Who asked the run to stop, as far as any rank knows. All ranks call it together."""
        return next(filter(None, self.dist.gather(self.preemption.reason)), "asked to stop")

    def _finish(self, outcome: Outcome) -> None:
        """Record the end of a start that did not fail; all ranks leave together."""
        self.callbacks.on_fit_end(outcome)
        self.events.write(
            "end",
            status=outcome.status,
            steps_done=outcome.steps_done,
            reason=outcome.reason,
            message=f"{outcome.status}: {outcome.reason}",
        )
        if self.dist.is_rank_zero:
            self.session.exit_file.write(outcome.status, reason=outcome.reason)
        self.dist.barrier()
