"""Clotho-AQA: three people a question; right for any, for most, and where all agree."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.people import measure_people
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_short

TASK = Task(
    name="clotho-aqa",
    title="Clotho-AQA",
    summary="Questions about sounds, exact match.",
    modalities=("audio",),
    split="test",
    prompts=make_short(),
    measure=measure_people,
    paper={"exact match (any)": 57.9},
)
