"""VQAv2: soft accuracy of vqaEval.py; the test splits give a file for EvalAI."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.vqa_accuracy import measure_official
from onellm_dist.evaluation.tasks.answer_files import make_list_check, make_list_file
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_short

TASK = Task(
    name="vqav2",
    title="VQAv2",
    summary="Open questions about pictures, soft accuracy.",
    modalities=("image",),
    split="val",
    prompts=make_short(),
    measure=measure_official,
    paper={"accuracy": 71.6},
    answer_files=make_list_file("vqav2.json", question_id="question_id", answer="answer"),
    check_file=make_list_check(question_id=int, answer=str),
)
