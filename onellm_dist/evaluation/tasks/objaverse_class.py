"""What an Objaverse object is: another model compares; its answer file is written."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.exact import measure_nothing
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.grading import OBJECTS
from onellm_dist.evaluation.tasks.objaverse_file import check_results, write_results
from onellm_dist.evaluation.tasks.prompts import ask_always

TASK = Task(
    name="objaverse-class",
    title="Objaverse classes",
    summary="What a point cloud shows; another model scores.",
    modalities=("point",),
    split="val200",
    prompts={
        "paper": ask_always("What is this?"),
        "completion": ask_always("This is an object of "),
    },
    measure=measure_nothing,
    paper={"GPT-4 accuracy": 44.5},
    answer_files=write_results,
    check_file=check_results,
    grading=OBJECTS,
    note="PointLLM's own program scores objaverse.json.",
)
