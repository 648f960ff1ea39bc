"""The contract of a task: what is asked, how, and how the answers are scored.

A task is one module of this folder with a `TASK`, or an entry point of the group
`onellm_dist.tasks` in another package:

    [project.entry-points."onellm_dist.tasks"]
    birdsong = "my_package.birdsong"

Its dataset is built by a source of shards whose samples have `questions` in their `.json` (see
shards/sources/readers/benchmarks.py). A module of tasks must not import torch: `onellm score` runs
where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from onellm_dist.common.errors import UsageError
from onellm_dist.evaluation.questions import BenchmarkQuestion, GivenAnswer
from onellm_dist.evaluation.scorers.measure import Measure
from onellm_dist.evaluation.tasks.grading import Grading

PromptBuilder = Callable[[BenchmarkQuestion], str]
AnswerFiles = Callable[[Sequence[GivenAnswer]], Mapping[str, bytes]]
"""From answers to the files that a server takes, by name."""
FormatCheck = Callable[[str, bytes], Sequence[str]]
"""From the name and content of such a file to what is wrong with it."""
REFERENCE_TOKENS = 128
"""New tokens of the reference's scripts; MM-Vet's has 256."""


@dataclass(frozen=True)
class Task:
    """One benchmark."""

    name: str
    """Name on the command line."""
    title: str
    """Name of the benchmark in tables and pages."""
    summary: str
    """What is measured, in one sentence."""
    modalities: tuple[str, ...]
    """What every question is about."""
    split: str
    """The split that is asked, unless another one is chosen."""
    prompts: Mapping[str, PromptBuilder]
    """Name -> prompt; the first is used unless another one is chosen."""
    measure: Callable[[Sequence[GivenAnswer]], list[Measure]]
    """Answers to scores, the most important first."""
    max_new_tokens: int = 32
    """Most tokens of an answer."""
    reference_tokens: int = REFERENCE_TOKENS
    """Most tokens of an answer in the reference's script."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """Measure -> score of OneLLM-7B in the paper."""
    answer_files: AnswerFiles | None = None
    """Makes the files that a server takes."""
    check_file: FormatCheck | None = None
    """Checks such a file against the server's rules."""
    grading: Grading | None = None
    """How another model scores the answers, besides `measure`."""
    note: str = ""
    """How a score differs from the official program's; the page shows it."""
    missing: Callable[[], Mapping[str, str]] = dict
    """Measure that cannot be computed on this machine -> why."""

    def get_prompt(self, name: str | None) -> tuple[str, PromptBuilder]:
        """Return the name of a prompt, and what builds it.

        Args:
            name: the prompt; None: the task's own.

        Raises:
            UsageError: there is no such prompt.
        """
        chosen = name or next(iter(self.prompts))
        if chosen not in self.prompts:
            raise UsageError(
                f"task {self.name} has no prompt {chosen!r}",
                "the wording of a question changes its answers.",
                f"use one of: {', '.join(self.prompts)}.",
            )
        return chosen, self.prompts[chosen]
