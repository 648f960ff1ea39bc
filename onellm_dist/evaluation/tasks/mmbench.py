"""MMBench: CircularEval, with options read by VLMEvalKit's rule and no other model."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.mmbench import measure_circular
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.mmbench_table import check_table, write_table
from onellm_dist.evaluation.tasks.prompts import CHOICE

TASK = Task(
    name="mmbench",
    title="MMBench",
    summary="Multiple choice in every order of the options, CircularEval.",
    modalities=("image",),
    split="dev",
    prompts=CHOICE,
    measure=measure_circular,
    paper={"CircularEval accuracy": 60.0},
    answer_files=write_table,
    check_file=check_table,
)
