"""NExT-QA, multiple choice; by causal, temporal and descriptive questions."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.choices import measure_choices
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import CHOICE

TASK = Task(
    name="nextqa",
    title="NExT-QA",
    summary="Why, how and what in videos, multiple choice, accuracy.",
    modalities=("video",),
    split="test",
    prompts=CHOICE,
    measure=measure_choices,
    paper={"accuracy": 57.3},
)
