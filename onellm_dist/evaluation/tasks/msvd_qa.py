"""MSVD-QA: exact match, and by name the rule of the reference's script."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.exact import measure_msvd
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_short

TASK = Task(
    name="msvd-qa",
    title="MSVD-QA",
    summary="Open questions about short videos, exact match.",
    modalities=("video",),
    split="test",
    prompts=make_short(),
    measure=measure_msvd,
    paper={"accuracy of the reference's script": 56.5},
)
