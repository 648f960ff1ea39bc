"""Benchmarks that another model scores: what it is asked, and how its reply is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from onellm_dist.evaluation.questions import GivenAnswer

_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the "
    "countries Iceland and Greenland are misleading. Despite its name, Iceland is known for its "
    "beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is "
    "saying that the person has trust issues because the names of these countries do not "
    "accurately represent their landscapes. | "
)
MMVET_PROMPT = f"""\
Compare the ground truth and prediction from AI models, to give a correctness score for the \
prediction. <AND> in the ground truth means it is totally right only when all elements in the \
ground truth are present in the prediction, and <OR> means it is totally right when any one \
element in the ground truth is present in the prediction. The correctness score is 0.0 (totally \
wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the \
last space of the correctness score.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0
What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0
{_MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their names, \
Iceland is not very icy and Greenland isn't very green. | 0.4
{_MEME}The meme is using humor to point out the misleading nature of Iceland's and Greenland's \
names. Iceland, despite its name, has lush green landscapes while Greenland is mostly covered in \
ice and snow. The text 'This is why I have trust issues' is a playful way to suggest that these \
contradictions can lead to distrust or confusion. The humor in this meme is derived from the \
unexpected contrast between the names of the countries and their actual physical \
characteristics. | 1.0
"""
"""MM-Vet's few-shot prompt (Yu et al. 2023, arXiv 2308.02490, Table 1)."""
OBJECT_PROMPT = """\
Analyze two sentences and determine if they're referring to the same general object or concept, \
focusing on the type of object, not attributes such as color, size, or shape. Respond with 'T' if \
they refer to the same thing and 'F' if not. Also, provide a brief rationale (no more than 20 \
words) for your judgment.
Example:
Input: 1. Spiral staircase that goes from a ground floor. 2. This is a 3D model of wooden stairs \
in light brown
Output: T#Both refer to a staircase.

Now, analyze the following:
Input: 1. {truth} 2. {answer}
Output: """
"""PointLLM's prompt for free-form classes (Xu et al. 2023, arXiv 2308.16911, appendix)."""


@dataclass(frozen=True)
class Grading:
    """How another model scores the answers of a benchmark."""

    measure: str
    """Name of the score in the paper."""
    unit: str
    """What is averaged: a score or an accuracy."""
    build: Callable[[GivenAnswer], str]
    """From an answer to what the model is asked."""
    read: Callable[[str], float | None]
    """From the grader's reply to a score from 0 to 1; None: it cannot be read."""
    max_tokens: int
    """Most tokens of a reply."""


def ask_mmvet(answer: GivenAnswer) -> str:
    """MM-Vet's prompt: one more row of its table."""
    truth = answer.question.answers[0]
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{MMVET_PROMPT}\n{' | '.join([answer.question.text, truth, answer.text, ''])}"


def read_mmvet(reply: str) -> float | None:
    """A number from 0 to 1 in front, as MM-Vet's program reads it."""
    try:
        score = float(reply.strip().split(" ")[0].strip("|"))
    except ValueError:
        return None
    return score if 0 <= score <= 1 else None


def ask_object(answer: GivenAnswer) -> str:
    """PointLLM's prompt about two descriptions."""
    return OBJECT_PROMPT.format(truth=answer.question.answers[0], answer=answer.text)


def read_object(reply: str) -> float | None:
    """`T#...` or `F#...`."""
    found = re.match(r"\s*'?([TF])\b", reply)
    return None if found is None else float(found[1] == "T")


MMVET = Grading("GPT-4 score", "score", ask_mmvet, read_mmvet, 16)
OBJECTS = Grading("GPT-4 accuracy", "accuracy", ask_object, read_object, 64)
