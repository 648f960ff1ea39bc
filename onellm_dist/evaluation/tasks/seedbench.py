"""SEED-Bench: the emitted letter is compared; the official program ranks likelihoods."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.choices import measure_choices
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import CHOICE

TASK = Task(
    name="seedbench",
    title="SEED-Bench (pictures)",
    summary="Multiple choice about pictures, accuracy.",
    modalities=("image",),
    split="test",
    prompts=CHOICE,
    measure=measure_choices,
    paper={"accuracy": 61.2},
)
