"""MM-Vet: scored by another model; its answer file is written."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.exact import measure_nothing
from onellm_dist.evaluation.tasks.answer_files import check_map, make_map_file
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.grading import MMVET
from onellm_dist.evaluation.tasks.prompts import ask_as_written

TASK = Task(
    name="mmvet",
    title="MM-Vet",
    summary="Open answers that another model scores.",
    modalities=("image",),
    split="test",
    prompts={"paper": ask_as_written},
    measure=measure_nothing,
    max_new_tokens=256,
    reference_tokens=256,
    paper={"GPT-4 score": 29.1},
    answer_files=make_map_file("mmvet.json", "key"),
    check_file=check_map,
    grading=MMVET,
    note="The official evaluator takes mmvet.json; its model is GPT-4 of June 2023.",
)
