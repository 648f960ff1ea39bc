"""ScienceQA: the questions with a picture; letters are read as LLaVA's program does."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.choices import measure_scienceqa
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import CHOICE

TASK = Task(
    name="scienceqa",
    title="ScienceQA (pictures)",
    summary="School questions with a picture, accuracy.",
    modalities=("image",),
    split="test",
    prompts=CHOICE,
    measure=measure_scienceqa,
    paper={"accuracy": 63.4},
)
