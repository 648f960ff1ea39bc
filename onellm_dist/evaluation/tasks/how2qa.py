"""How2QA: four options whose order is drawn, because the file has the right one last."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.choices import measure_choices
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import CHOICE

TASK = Task(
    name="how2qa",
    title="How2QA",
    summary="Multiple choice about clips, accuracy.",
    modalities=("video",),
    split="val",
    prompts=CHOICE,
    measure=measure_choices,
    paper={"accuracy": 65.7},
)
