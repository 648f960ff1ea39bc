"""GQA: one reference, exact match as its official program (through LLaVA's conversion)."""

from __future__ import annotations

from onellm_dist.evaluation.scorers.exact import measure_gqa
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_short

TASK = Task(
    name="gqa",
    title="GQA",
    summary="Compositional questions about pictures, exact match.",
    modalities=("image",),
    split="testdev",
    prompts=make_short(),
    measure=measure_gqa,
    paper={"accuracy": 59.5},
)
