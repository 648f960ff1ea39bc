"""NYUv2: the class of a room from its depth map; chance is 10%."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.exact import measure_classes
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import ask_scene

TASK = Task(
    name="nyuv2-depth",
    title="NYUv2 (depth)",
    summary="The class of a room from its depth map, accuracy.",
    modalities=("depth",),
    split="test",
    prompts={"paper": ask_scene},
    measure=measure_classes,
    paper={"accuracy": 50.9},
)
