"""Multiple choice: how a letter is read from an answer, and what counts as right.

Nothing is picked at random: an answer without a readable letter is wrong, and the report says how
many there were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.scorers.captions import normalise_text
from onellm_dist.evaluation.scorers.labels import collect_labels
from onellm_dist.evaluation.scorers.measure import Measure

LETTERS = "ABCDEFGHIJ"
HowRead = Literal["letter", "letter and text", "the answer is", "text of an option", "not read"]
"""How the option was read from an answer."""
# A small a or i may be a word ("The answer is a dog.", "a, dog"), but not in parentheses. Behind
# the other small letters no word continues ("e.g.", "d'accord").
_SMALL = r"[b-hj](?![\w'’-]|\.\w)"
_SENTENCE = re.compile(
    rf"\b(?i:answer|option|choice) (?i:is):? *(?:\(?([A-J]\b|{_SMALL})|\(([ai])\s*\))"
)
_LEADING = re.compile(rf"\(?([A-J]|{_SMALL})\s*[.):,]|\(?([ai])\s*\)")


@dataclass(frozen=True)
class ReadChoice:
    """The option that an answer names."""

    letter: str
    """"" if none could be read."""
    how: HowRead


def read_choice(answer: str, options: Sequence[str]) -> ReadChoice:
    """Read the option from an answer: a letter alone, `B. a dog`, `The answer is B`, or its text.

    Args:
        answer: what the model said.
        options: the texts of the options.
    """
    known = LETTERS[: len(options)]
    text = answer.strip()
    bare = text.strip("().:, ").upper()
    if len(bare) == 1 and bare in known:
        return ReadChoice(bare, "letter")
    leading = _LEADING.match(text)
    if leading and (letter := (leading[1] or leading[2]).upper()) in known:
        return ReadChoice(letter, "letter and text")
    named = {(found[1] or found[2]).upper() for found in _SENTENCE.finditer(text)}
    if len(named) == 1 and (letter := named.pop()) in known:
        return ReadChoice(letter, "the answer is")
    said = normalise_text(text)
    same = [known[i] for i, option in enumerate(options) if normalise_text(option) == said]
    if said and len(same) == 1:
        return ReadChoice(same[0], "text of an option")
    return ReadChoice("", "not read")


def read_scienceqa(answer: str, options: Sequence[str]) -> ReadChoice:
    """Read the option as LLaVA's eval_science_qa.py does; it reads letters A to E alone."""
    known = LETTERS[:5]
    if len(answer) == 1 and answer in known:
        found = ReadChoice(answer, "letter")
    elif len(answer) >= 3 and answer[0] in known and answer[1:3] == ". ":
        found = ReadChoice(answer[0], "letter and text")
    else:
        named = re.findall(r"The answer is ([A-Z]).", answer)
        found = ReadChoice(named[0], "the answer is") if len(named) == 1 else _NOT_READ
    return found if found.letter in tuple(LETTERS[: len(options)]) else _NOT_READ


_NOT_READ = ReadChoice("", "not read")
Reader = Callable[[str, Sequence[str]], ReadChoice]


def measure_choices(answers: Sequence[GivenAnswer], read: Reader = read_choice) -> list[Measure]:
    """Share of right options, and how the options were read.

    Args:
        answers: questions with options; the reference is a letter.
        read: from an answer and the options to the option that it names.
    """
    found = {a.question.id: read(a.text, a.question.options) for a in answers}
    values = {
        a.question.id: float(found[a.question.id].letter == a.question.answers[0]) for a in answers
    }
    how = {"how the option was read": [found[a.question.id].how for a in answers]}
    return [Measure.from_values("accuracy", values, {**collect_labels(answers), **how})]


def measure_scienceqa(answers: Sequence[GivenAnswer]) -> list[Measure]:
    """ScienceQA: LLaVA's reading of the letter."""
    return measure_choices(answers, read_scienceqa)
