"""SUN RGB-D: the class of a room from its normal map; chance is 5.26%."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.exact import measure_classes
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import ask_scene

TASK = Task(
    name="sunrgbd-normal",
    title="SUN RGB-D (normal)",
    summary="The class of a room from its normal map, accuracy.",
    modalities=("normal",),
    split="test",
    prompts={"paper": ask_scene},
    measure=measure_classes,
    paper={"accuracy": 21.2},
)
