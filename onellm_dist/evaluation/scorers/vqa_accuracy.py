"""VQA's soft accuracy, with the peculiarities of its two official programs.

An answer scores the mean, over the ten people, of min(1, matches among the other nine / 3).
`official` is visualqa.org's vqaEval.py: texts are normalised only where the ten answers differ.
`evalai` is EvalAI's processor, as LLaVA's evaluation of TextVQA has it: texts are always
normalised, and commas and question marks removed first.

Both remove periods with a pattern that was meant to keep those of numbers and does not, and both
pass `re.UNICODE` where the number of replacements stands, so that only 32 periods of a text go.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.scorers.labels import collect_labels
from onellm_dist.evaluation.scorers.measure import Measure

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA = re.compile(r"(\d)(,)(\d)")
_MOST_PERIODS = int(re.UNICODE)


@cache
def load_words(name: str) -> Mapping[str, str]:
    """Words and what they become, as the official programs have them.

    Args:
        name: `contractions` (without their apostrophe -> with it) or `number_words`.
    """
    text = (files(__package__) / f"{name}.json").read_text(encoding="utf-8")
    words: dict[str, str] = json.loads(text)
    return words


def normalise_official(text: str) -> str:
    """Normalise as vqaEval.py does where the ten answers differ."""
    kept = text
    has_comma = _COMMA.search(text) is not None
    for mark in PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text or has_comma
        kept = kept.replace(mark, "" if touches else " ")
    kept = _PERIOD.sub("", kept, count=_MOST_PERIODS)
    numbers, contractions = load_words("number_words"), load_words("contractions")
    words = [numbers.get(word, word) for word in kept.lower().split()]
    return " ".join(contractions.get(w, w) for w in words if w not in ("a", "an", "the"))


def normalise_evalai(text: str) -> str:
    """Normalise as EvalAI's answer processor does."""
    lower = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_official(_flatten(lower))


def _flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def compute_accuracy(answer: str, references: Sequence[str]) -> float:
    """Soft accuracy of an answer against the people's, compared as they are."""
    others = Counter(references)
    matches = others[answer]
    # A person who said the same has one match fewer among the others.
    same = min(1.0, (matches - 1) / 3) if matches else 0.0
    other = min(1.0, matches / 3)
    return (matches * same + (len(references) - matches) * other) / len(references)


def score_official(answer: str, references: Sequence[str]) -> float:
    """Score as vqaEval.py does: without normalisation where all people say the same."""
    given, people = _flatten(answer), [_flatten(r) for r in references]
    if len(set(people)) > 1:
        given, people = normalise_official(given), [normalise_official(p) for p in people]
    return compute_accuracy(given, people)


def score_evalai(answer: str, references: Sequence[str]) -> float:
    """Score as EvalAI's processor does, which LLaVA uses for TextVQA."""
    return compute_accuracy(normalise_evalai(answer), [normalise_evalai(r) for r in references])


def measure_official(answers: Sequence[GivenAnswer]) -> list[Measure]:
    """VQAv2 and OK-VQA: lower-case predictions, vqaEval.py's rule, by type of answer."""
    values = {a.question.id: score_official(a.text.lower(), a.question.answers) for a in answers}
    return [Measure.from_values("accuracy", values, collect_labels(answers), graded=True)]


def measure_evalai(answers: Sequence[GivenAnswer]) -> list[Measure]:
    """TextVQA and VizWiz."""
    values = {a.question.id: score_evalai(a.text, a.question.answers) for a in answers}
    return [Measure.from_values("accuracy", values, collect_labels(answers), graded=True)]
