"""Validation in the course of a run: the packed loss over a fixed set, a line of `validation.jsonl` each time.

Every rank runs the forward of every micro-step, dummies included, exactly as in training and without a backward: so the
collectives of a sharded model meet.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from onellm_dist.config.schema import ValidationSection
from onellm_dist.data.loader import Loader
from onellm_dist.data.plan import Plan
from onellm_dist.train.callbacks.sample_generation import Answers, Show
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.records.metrics import Events, drop_from
from onellm_dist.train.totals import StepTotals

VALIDATION = "validation.jsonl"


class Validation:
    """Validates when it is due; every method is called by all ranks together.

    Args:
        plan: its step 0 is the validation set (`data.validation.open_validation_plan`).
        model: the model inside the engine, to be told that it does not train meanwhile.
        first_step: lines of later steps, left by a start that went further than its last checkpoint, are dropped.
        steps: of the whole run; the last one is validated too.
        answers: what generates answers to some of the samples, if anybody asked.
    """

    show: Show | None = None
    """Where generated answers are shown beside their file."""

    def __init__(
        self,
        config: ValidationSection,
        plan: Plan,
        engine: Engine,
        model: Any,
        dist: Distributed,
        run_dir: Path,
        events: Events,
        *,
        first_step: int,
        steps: int,
        answers: Answers | None = None,
    ) -> None:
        self._config, self._plan, self._engine, self._model, self._dist = (
            config,
            plan,
            engine,
            model,
            dist,
        )
        self._path, self._events, self._steps, self._answers = (
            run_dir / VALIDATION,
            events,
            steps,
            answers,
        )
        if dist.is_rank_zero:
            drop_from(self._path, first_step + 1)

    def due(self, done: int) -> bool:
        """Whether the set is run after `done` steps."""
        return done % self._config.every == 0 or done == self._steps

    def run(self, done: int) -> float:
        """Runs the set after `done` steps and records it; returns the loss (mean cross-entropy of a supervised token)."""
        started = time.perf_counter()
        training = self._model.training
        self._model.eval()
        totals = StepTotals(sorted(set(self._plan.corpus.spans)), self._dist.device)
        skipped_samples = 0
        with (
            torch.no_grad(),
            Loader(self._plan, self._dist.world_size, self._dist.rank, 0, 1) as loader,
        ):
            for micro, batch in loader:
                on_device = batch.to(self._dist.device)
                totals.add(on_device, *self._engine.forward(on_device, last=micro.last))
                skipped_samples += len(batch.skipped_samples)
        if self._answers is not None:
            self._answers.run(done, self.show)
        self._model.train(training)
        totals.reduce(self._dist, new_skipped_samples=skipped_samples, stop=False)
        values = totals.read()
        global_valid_tokens = self._plan.step(0, self._dist.world_size).global_valid_tokens
        line = {
            "step": done,
            "loss": values.loss / global_valid_tokens,
            "loss_by_modality": values.nll,
            "samples": self._config.samples,
            "supervised_tokens": global_valid_tokens,
            "skipped_samples": values.new_skipped_samples,
            "sample_digest": self._plan.digest(0),
            "seconds": time.perf_counter() - started,
        }
        if self._dist.is_rank_zero:
            with self._path.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
                out.flush()
                os.fsync(out.fileno())
        kinds = " ".join(f"{name} {value:.3f}" for name, value in values.nll.items())
        self._events.write(
            "validation",
            step=done,
            loss=values.loss / global_valid_tokens,
            say=f"validation after step {done}: loss {values.loss / global_valid_tokens:.4f} ({kinds})",
        )
        return values.loss / global_valid_tokens
