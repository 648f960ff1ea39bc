"""The contract of a task: which samples are asked, how, and how the answers are scored.

A task is one module of this folder with a `TASK`, or an entry point of the group
`onellm_dist.tasks` in another package:

    [project.entry-points."onellm_dist.tasks"]
    birdsong = "my_package.birdsong"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onellm_dist.evaluation.report import Caption, ModalityResult


@dataclass(frozen=True)
class Task:
    """One evaluation."""

    name: str
    """Name on the command line."""
    summary: str
    """What is measured, in one sentence."""
    splits: tuple[str, ...]
    """The splits of the dataset that are asked; every dataset must have them."""
    score: Callable[[Sequence[Caption]], list[ModalityResult]]
    """Answers to scores, by modality and split."""
    ask: bool = True
    """Whether to ask the sample's own question; False asks for the caption, as align trains it."""
    new_tokens: int = 24
    """Maximum length of an answer, in tokens."""
