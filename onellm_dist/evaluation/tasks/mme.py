"""MME: accuracy and accuracy+ of 14 tasks; the paper's number is perception."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.mme import measure_mme
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.mme_files import check_lists, write_lists
from onellm_dist.evaluation.tasks.prompts import SHORT_PAPER, ask_as_written, make_suffix

TASK = Task(
    name="mme",
    title="MME",
    summary="Yes or no about pictures, two questions a picture.",
    modalities=("image",),
    split="test",
    prompts={"paper": ask_as_written, "short": make_suffix(SHORT_PAPER)},
    measure=measure_mme,
    paper={"perception": 1392.0},
    answer_files=write_lists,
    check_file=check_lists,
)
