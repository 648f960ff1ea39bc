"""MUSIC-AVQA: 42 words as answers; digits of an answer are read as words."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.exact import measure_numbers
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_short

TASK = Task(
    name="music-avqa",
    title="MUSIC-AVQA",
    summary="Questions about musicians seen and heard, exact match.",
    modalities=("video", "audio"),
    split="test",
    prompts=make_short(),
    measure=measure_numbers,
    paper={"accuracy": 47.6},
)
