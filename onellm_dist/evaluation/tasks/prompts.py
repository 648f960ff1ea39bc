"""The prompts of the tasks: the paper's (Table 11), and others by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onellm_dist.evaluation.questions import BenchmarkQuestion

LETTERS = "ABCDEFGHIJ"
SHORT_PAPER = "Answer the question using a single word or phase"
"""Prompt for a short answer as the paper prints it, with its misprint."""
SHORT_TRAINING = "Answer the question using a single word or phrase."
"""Prompt for a short answer as in the instruction data (paper, Table 10)."""
LETTER = "Answer with the option's letter from the given choices directly"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."

Builder = Callable[[BenchmarkQuestion], str]


def make_short(before: str = "") -> Mapping[str, Builder]:
    """Prompts of an open question: `paper`, and `training` as the instruction data ask.

    Args:
        before: a sentence before the request for a short answer.
    """

    def make(request: str) -> Builder:
        return lambda q: " ".join(filter(None, (q.text.strip(), before, request)))

    return {"paper": make(SHORT_PAPER), "training": make(SHORT_TRAINING)}


def list_options(options: Sequence[str]) -> str:
    """`A. first B. second`."""
    return " ".join(f"{LETTERS[i]}. {option.strip()}" for i, option in enumerate(options))


def ask_choice(question: BenchmarkQuestion) -> str:
    """The paper's question with options; a hint stands before it."""
    hint = str(question.extra.get("hint") or "").strip()
    asked = f"{hint} {question.text.strip()}".strip()
    return f"{asked} {list_options(question.options)} {LETTER}"


def ask_choice_lines(question: BenchmarkQuestion) -> str:
    """LLaVA's and lmms-eval's form: an option a line."""
    hint = str(question.extra.get("hint") or "").strip()
    options = [f"{LETTERS[i]}. {option.strip()}" for i, option in enumerate(question.options)]
    lines = [hint, question.text.strip(), *options, f"{LETTER}."]
    return "\n".join(line for line in lines if line)


CHOICE: Mapping[str, Builder] = {"paper": ask_choice, "lmms-eval": ask_choice_lines}


def ask_always(prompt: str) -> Builder:
    """Make a builder that asks every question in the same words."""
    return lambda question: prompt


def make_caption(what: str) -> Mapping[str, Builder]:
    """The paper's prompt for captions.

    Args:
        what: the medium in words, such as `point cloud`.
    """
    return {"paper": ask_always(f"Provide a one-sentence caption for the provided {what}.")}


def ask_scene(question: BenchmarkQuestion) -> str:
    """The paper's prompt for scenes (its words)."""
    classes = ", ".join(question.options)
    return f"{classes}. What is the category of this scene? Choice one class from the class sets."


def ask_as_written(question: BenchmarkQuestion) -> str:
    """The benchmark's own words."""
    return question.text.strip()


def make_suffix(suffix: str) -> Builder:
    """The benchmark's own words, and a sentence after them."""
    return lambda question: f"{question.text.strip()} {suffix}"


def make_named(name: str, what: str) -> Mapping[str, Builder]:
    """The prompt for captions under another name.

    Args:
        name: of the prompt.
        what: the medium in words.
    """
    return {name: make_caption(what)["paper"]}
