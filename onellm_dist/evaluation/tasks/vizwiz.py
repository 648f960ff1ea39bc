"""VizWiz: soft accuracy of EvalAI's processor, unanswerable questions included."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.vqa_accuracy import measure_evalai
from onellm_dist.evaluation.tasks.answer_files import make_list_check, make_list_file
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import UNANSWERABLE, make_short

TASK = Task(
    name="vizwiz",
    title="VizWiz",
    summary="Questions of blind people about their pictures, soft accuracy.",
    modalities=("image",),
    split="val",
    prompts=make_short(UNANSWERABLE),
    measure=measure_evalai,
    paper={"accuracy": 45.9},
    answer_files=make_list_file("vizwiz.json", image="image", answer="answer"),
    check_file=make_list_check(image=str, answer=str),
)
