"""What a start reads before it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onellm_dist.config.train_sections import LoraSection
from onellm_dist.data.plan import Plan
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.start.frozen_placement import FrozenDecision
from onellm_dist.train.start.pack_budget import PackBudget


@dataclass(frozen=True)
class Inputs:
    """What a start reads before it trains.

    Attributes:
        target: the checkpoint that is resumed.
        manifest: its manifest; {} where nothing is resumed.
        model: the model, on the meta device.
        processor: its processor.
        plan: the plan of the run.
        validation_plan: the plan of the validation set; None where there is none.
        new_phase: whether a new data phase begins.
        lora: the `train.lora` section.
        budget: token budgets that were found for this start; None: the recipe has numbers.
        frozen: where frozen weights lie, if this start decided that.
    """

    target: ResumeTarget
    manifest: dict[str, Any]
    model: Any
    processor: Any
    plan: Plan
    validation_plan: Plan | None
    new_phase: bool
    lora: LoraSection | None = None
    budget: PackBudget | None = None
    frozen: FrozenDecision | None = None

    @property
    def modalities(self) -> set[str]:
        """The modalities of the mixture."""
        return {name for spans in self.plan.corpus.spans for name in spans}

    @property
    def all_modalities(self) -> set[str]:
        """The modalities of the mixture and of the validation set."""
        if self.validation_plan is None:
            return self.modalities
        spans = self.validation_plan.corpus.spans
        return self.modalities | {name for names in spans for name in names}

    @property
    def plan_changed(self) -> bool:
        """Whether a checkpoint of 0.1.0, which has no data phases, was written with other data."""
        manifest = self.manifest
        if self.target.folder is None or "data_phases" in manifest:
            return False
        return bool(manifest["plan"] != self.plan.fingerprint())
