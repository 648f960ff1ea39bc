"""TextVQA: soft accuracy of EvalAI's processor; prompts hold no OCR tokens."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.vqa_accuracy import measure_evalai
from onellm_dist.evaluation.tasks.answer_files import make_list_check, make_list_file
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_short

TASK = Task(
    name="textvqa",
    title="TextVQA",
    summary="Questions about text in pictures, soft accuracy.",
    modalities=("image",),
    split="val",
    prompts=make_short(),
    measure=measure_evalai,
    paper={"accuracy": 34.0},
    answer_files=make_list_file("textvqa.json", question_id="question_id", answer="answer"),
    check_file=make_list_check(question_id=int, answer=str),
)
