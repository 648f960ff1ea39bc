"""MMBench's CircularEval, with options read as VLMEvalKit does without another model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.scorers.choices import LETTERS, ReadChoice, measure_choices
from onellm_dist.evaluation.scorers.labels import collect_labels
from onellm_dist.evaluation.scorers.measure import Measure

_NOT_READ = ReadChoice("", "not read")
_UNANSWERED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SENTENCE = re.compile(r"answer\s+is\s+\**([A-D])", re.IGNORECASE)
_LAST_WORDS = 4
"""A letter counts if its first occurrence is among so many last words."""
_NO_OPTION = "Z"
"""The letter that says that no option is right."""


def read_vlmevalkit(answer: str, options: Sequence[str]) -> ReadChoice:
    """Read the option as VLMEvalKit's can_infer does, which has no random pick.

    Its oddities are kept: a small letter alone is not read, `The answer is a dog` names A, and an
    option is named by its text anywhere in an answer of at most twice the length of all options.

    Args:
        answer: what the model said.
        options: the texts of the options.
    """
    known = LETTERS[: len(options)]
    if _UNANSWERED not in answer:
        if any(refusal in answer for refusal in _REFUSALS):
            return _NOT_READ
        words = answer.translate(_SPACED).split()
        named = [letter for letter in known if letter in words]
        if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
            return ReadChoice(named[0], "letter")
        if not named and _NO_OPTION in words:
            return _NOT_READ
        said = _SENTENCE.search(answer)
        if said and said[1].upper() in known:
            return ReadChoice(said[1].upper(), "the answer is")
    return _read_text(answer.lower(), [option.lower() for option in options])


def _read_text(answer: str, options: Sequence[str]) -> ReadChoice:
    if len(answer) > 2 * sum(map(len, options)):
        return _NOT_READ
    named = [LETTERS[i] for i, option in enumerate(options) if option in answer]
    return ReadChoice(named[0], "text of an option") if len(named) == 1 else _NOT_READ


def measure_circular(answers: Sequence[GivenAnswer]) -> list[Measure]:
    """MMBench's CircularEval: a question counts if it is right in every order of its options.

    The rows of a question, as many as it has options, have the same `extra["group"]`; one of which
    rows are missing (--limit, --partial, --without) does not count (VLMEvalKit takes the rows that
    are there). Beside it, the share of right first rows.
    """
    single = measure_choices(answers, read_vlmevalkit)[0]
    right = dict(zip(single.units, single.rows[:, 0].tolist(), strict=True))
    groups: dict[str, list[GivenAnswer]] = {}
    for answer in answers:
        groups.setdefault(str(answer.question.extra["group"]), []).append(answer)
    firsts = [members[0] for members in groups.values()]
    whole = {n: rows for n, rows in groups.items() if len(rows) >= len(rows[0].question.options)}
    values: Mapping[str, float] = {
        name: float(all(right[a.question.id] for a in members)) for name, members in whole.items()
    }
    labels = collect_labels([members[0] for members in whole.values()])
    circular = Measure.from_values("CircularEval accuracy", values, labels)
    vanilla = measure_choices(firsts, read_vlmevalkit)[0]
    return [
        *([circular] if whole else ()),
        Measure.from_values(
            "accuracy of the first order",
            dict(zip(vanilla.units, vanilla.rows[:, 0].tolist(), strict=True)),
            vanilla.labels,
        ),
    ]
