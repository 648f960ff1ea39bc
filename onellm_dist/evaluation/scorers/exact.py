"""Exact match in its variants, each by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.scorers.captions import normalise_text
from onellm_dist.evaluation.scorers.labels import collect_labels
from onellm_dist.evaluation.scorers.measure import Measure
from onellm_dist.evaluation.scorers.vqa_accuracy import load_words


def match_gqa(answer: str, references: Sequence[str]) -> bool:
    """GQA as LLaVA converts answers for its official program: final period off, lower case."""
    return answer.rstrip(".").lower() == references[0]


def match_strict(answer: str, references: Sequence[str]) -> bool:
    """Equal to a reference without case and punctuation; an empty answer is wrong."""
    said = normalise_text(answer)
    return bool(said) and any(said == normalise_text(r) for r in references)


def match_reference_script(answer: str, references: Sequence[str]) -> bool:
    """The rule of the reference's MSVD script: one text contains the other.

    An empty answer is contained in everything, so it is always right here.
    """
    said = answer.strip().lower()
    return any(said in r.strip().lower() or r.strip().lower() in said for r in references)


def match_numbers(answer: str, references: Sequence[str]) -> bool:
    """MUSIC-AVQA: its numbers are words, `more than ten` included; digits are read as words.

    An instrument's underscore (`acoustic_guitar`) is a space.
    """
    words = {digits: word for word, digits in load_words("number_words").items()}
    plain, *named = (normalise_text(text.replace("_", " ")) for text in (answer, *references))
    said = re.sub(r"\d+", lambda m: words.get(m[0], "more than ten"), plain)
    return bool(said) and said in named


def match_class(answer: str, references: Sequence[str], classes: Sequence[str]) -> bool:
    """A class of a list: the longest class that the answer names, and it names one alone.

    Args:
        answer: what the model said.
        references: the right class.
        classes: all classes.
    """
    return find_class(answer, classes) in references


def find_class(answer: str, classes: Sequence[str]) -> str:
    """The one class that an answer names; "" if there is none, or several."""
    said = f" {normalise_text(answer)} "
    named = [c for c in classes if f" {normalise_text(c)} " in said]
    # `home office` names the class office too
    longest = [
        c
        for c in named
        if not any(c != d and normalise_text(c) in normalise_text(d) for d in named)
    ]
    return longest[0] if len(longest) == 1 else ""


def make_measure(
    name: str, match: Callable[[str, Sequence[str]], bool]
) -> Callable[[Sequence[GivenAnswer]], list[Measure]]:
    """Make a scorer of one rule.

    Args:
        name: of the measure.
        match: from an answer and the references to whether it is right.
    """

    def measure(answers: Sequence[GivenAnswer]) -> list[Measure]:
        values = {a.question.id: float(match(a.text, a.question.answers)) for a in answers}
        return [Measure.from_values(name, values, collect_labels(answers))]

    return measure


measure_gqa = make_measure("accuracy", match_gqa)
measure_strict = make_measure("exact match", match_strict)
measure_numbers = make_measure("accuracy", match_numbers)


def measure_msvd(answers: Sequence[GivenAnswer]) -> list[Measure]:
    """Score by two rules: the strict one, and that of the reference's script."""
    script = make_measure("accuracy of the reference's script", match_reference_script)
    return [*measure_strict(answers), *script(answers)]


def measure_classes(answers: Sequence[GivenAnswer]) -> list[Measure]:
    """Classes that the question lists as its options; each class counts by its size."""
    values = {
        a.question.id: float(match_class(a.text, a.question.answers, a.question.options))
        for a in answers
    }
    return [Measure.from_values("accuracy", values, collect_labels(answers))]


def measure_nothing(answers: Sequence[GivenAnswer]) -> list[Measure]:
    """Benchmarks that another model scores: there is no score here."""
    return []
