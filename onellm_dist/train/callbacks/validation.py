"""Validation while a run trains: the packed loss over a fixed set, recorded in `validation.jsonl`.

Every rank runs the forward of every micro-batch, empty ones included, exactly as in training but
without a backward, so that the collectives of a sharded model meet.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.run_files import CHECKPOINTS, VALIDATION
from onellm_dist.config.schema import ValidationSection
from onellm_dist.data.loader import Loader
from onellm_dist.data.plan import Plan
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.checkpoint.folder import make_checkpoint_name
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.records.json_lines import read_lines, to_json
from onellm_dist.train.records.patient_file import PatientFile
from onellm_dist.train.totals import StepTotals, StepValues


class Validation(Callback):
    """Runs the validation set every `data.validation.every` steps and after the last step.

    A run that was asked to stop writes its checkpoint at once. If a validation was due there, the
    next start runs it first: the validations, and what depends on them, are those of a run that was
    never stopped.

    Args:
        config: the `data.validation` section.
        plan: its step 0 is the validation set (`data.validation.open_validation_plan`).
        engine: runs the forward.
        model: the model inside the engine, which is switched to evaluation mode meanwhile.
        dist: the ranks.
        run_dir: the run directory.
        steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        config: ValidationSection,
        *,
        plan: Plan,
        engine: Engine,
        model: Any,
        dist: Distributed,
        run_dir: Path,
        steps: int,
    ) -> None:
        self._config = config
        self._plan = plan
        self._engine = engine
        self._model = model
        self._dist = dist
        self._run_dir = run_dir
        self._file = PatientFile(run_dir / VALIDATION)
        self._steps = steps

    def before_first_step(self) -> None:
        first_step = self.trainer.state.first_step
        if first_step and self._is_due(first_step) and self._was_left_out(first_step):
            self._run_between_steps(first_step)

    def after_step(self, steps_done: int, *, stopping: bool) -> None:
        if self._is_due(steps_done) and not stopping:
            self._run_between_steps(steps_done)

    def _is_due(self, steps_done: int) -> bool:
        return steps_done % self._config.every == 0 or steps_done == self._steps

    def _was_left_out(self, steps_done: int) -> bool:
        """Whether this run has a checkpoint of a step, and no validation; the same on all ranks."""

        def look() -> bool:
            folder = self._run_dir / CHECKPOINTS / make_checkpoint_name(steps_done)
            lines = read_lines(self._run_dir / VALIDATION)
            # Scores of kept checkpoints on benchmarks stand there too, without a loss.
            done = {line.get("steps_done") for line in lines if "loss" in line}
            return folder.is_dir() and steps_done not in done

        return self._dist.ask_rank_zero(look)

    def _run_between_steps(self, steps_done: int) -> None:
        self.trainer.heartbeat.leave_step("validation")
        loss = self.run(steps_done)
        self.trainer.callbacks.on_validation_end(steps_done, loss)

    def run(self, steps_done: int) -> float:
        """Run the set and record it. Called by all ranks together.

        Args:
            steps_done: steps done so far.

        Returns:
            Mean cross-entropy of a supervised token; of pairs, their mean loss.
        """
        started = time.perf_counter()
        training = self._model.training
        self._model.eval()
        values = self._run_forward(steps_done)
        self._model.train(training)
        step_plan = self._plan.step(0, self._dist.world_size)
        loss = values.loss / step_plan.loss_count
        if self._dist.is_rank_zero:
            line = {
                "steps_done": steps_done,
                "loss": loss,
                "loss_by_modality": values.nll,
                **values.rewards,
                "samples": self._config.samples,
                "global_valid_tokens": step_plan.global_valid_tokens,
                "skipped_samples": values.new_skipped_samples,
                "sample_digest": self._plan.digest(0),
                "seconds": time.perf_counter() - started,
            }
            self._file.append(json.dumps(to_json(line)) + "\n")
        shown = {**values.nll, **values.rewards}
        losses = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
        self.trainer.events.write(
            "validation",
            steps_done=steps_done,
            loss=loss,
            message=f"validation after {format_count(steps_done, 'step')}: loss {loss:.4f} "
            f"({losses})",
        )
        return loss

    def _run_forward(self, steps_done: int) -> StepValues:
        """Run the forward of every micro-batch, call the callbacks, and sum over the ranks."""
        totals = StepTotals(self._plan.corpus.combinations, self._dist)
        skipped_samples = 0
        dist = self._dist
        loader = Loader(self._plan, dist.world_size, dist.rank, 0, 1, device=dist.device)
        with torch.no_grad(), loader:
            for micro, batch in loader:
                on_device = batch.to(dist.device)
                totals.add(on_device, *self._engine.forward(on_device, last=micro.last))
                skipped_samples += len(batch.skipped_samples)
        self.trainer.callbacks.on_validation(steps_done)
        totals.reduce(new_skipped_samples=skipped_samples)
        return totals.read()
