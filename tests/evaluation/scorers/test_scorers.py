"""Scorers against numbers of the official programs, and against rules worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onellm_dist.evaluation.questions import BenchmarkQuestion, GivenAnswer
from onellm_dist.evaluation.scorers import (
    choices,
    coco_captions,
    exact,
    mmbench,
    mme,
    people,
    vqa_accuracy,
)
from onellm_dist.evaluation.scorers.measure import Measure

RECORDED = Path(__file__).parents[2] / "fixtures" / "scorers"


def load(name: str) -> Any:
    return json.loads((RECORDED / f"{name}.json").read_text())


def give(answer: str, *references: str, key: str = "1", **others: Any) -> GivenAnswer:
    return GivenAnswer(BenchmarkQuestion(key, answers=references, **others), answer)


def value(measures: list[Measure], name: str) -> float:
    return next(m for m in measures if m.name == name).value


def test_vqa_accuracy_is_that_of_the_official_programs() -> None:
    cases = load("vqa")["cases"]
    assert len(cases) == 100
    for case in cases:
        given = case["answer"], case["references"]
        assert 100 * vqa_accuracy.score_official(*given) == pytest.approx(case["official"])
        assert 100 * vqa_accuracy.score_evalai(*given) == pytest.approx(case["evalai"], abs=1e-5)
    assert any(case["official"] != case["evalai"] for case in cases)


def test_the_oddities_of_vqa_accuracy() -> None:
    score = vqa_accuracy.score_official
    assert score("Yes", ["yes"] * 10) == 0  # nothing is normalised where all say the same
    assert score("Yes", ["yes"] * 9 + ["no"]) == 1
    assert score("yes", ["yes"] * 3 + ["no"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy.normalise_official("3.5.") == "3.5"
    assert vqa_accuracy.normalise_official("a" + ".x" * 40).count(".") == 8  # 32 periods go
    lower = vqa_accuracy.measure_official([give("Yes", *["yes"] * 10)])
    assert lower[0].value == 100  # predictions are made lower-case first


def test_scienceqa_is_read_as_llavas_program_does() -> None:
    recorded = load("scienceqa")
    options = ("one", "two", "three")
    read = [choices.read_scienceqa(p, options).letter for p in recorded["predictions"]]
    assert ["ABC".find(letter) if letter else -1 for letter in read] == recorded["read"]


@pytest.mark.parametrize(
    ("answer", "letter", "how"),
    [
        ("B", "B", "letter"),
        (" (b) ", "B", "letter"),
        ("b.", "B", "letter"),
        ("B. two dogs", "B", "letter and text"),
        ("The answer is C", "C", "the answer is"),
        ("Two dogs.", "B", "text of an option"),
        ("(b) two dogs", "B", "letter and text"),
        ("the ANSWER is (C).", "C", "the answer is"),
        ("The answer is (b).", "B", "the answer is"),
        ("the answer is c", "C", "the answer is"),
        ("The answer is (a) a cat.", "A", "the answer is"),
        ("The answer is B. I said: the answer is b", "B", "the answer is"),
        ("b. two dogs", "B", "letter and text"),
        ("c: three", "C", "letter and text"),
        ("(a) a cat", "A", "letter and text"),
        ("a) a cat", "A", "letter and text"),
        ("The answer is a", "", "not read"),
        ("The answer is c'est", "", "not read"),
        ("The answer is b.c. or later", "", "not read"),
        ("c.f. the picture", "", "not read"),
        ("The answer is (c) or, no, the answer is (b)", "", "not read"),
        ("The answer is a dog.", "", "not read"),
        ("a, dog", "", "not read"),
        ("a . dog", "", "not read"),
        ("D", "", "not read"),
        ("A or B", "", "not read"),
        ("The answer is A, no, the answer is B", "", "not read"),
        ("", "", "not read"),
        ("Because", "", "not read"),
    ],
)
def test_letters_are_read(answer: str, letter: str, how: str) -> None:
    found = choices.read_choice(answer, ("a cat", "two dogs", "three"))
    assert (found.letter, found.how) == (letter, how)


def test_circular_counts_a_question_if_all_its_orders_are_right() -> None:
    def row(key: str, group: int, said: str) -> GivenAnswer:
        return give(said, "A", key=key, options=("x", "y"), extra={"group": group})

    rows = [row("0", 0, "A"), row("1000000", 0, "A"), row("1", 1, "A"), row("1000001", 1, "B")]
    found = mmbench.measure_circular(rows)
    assert value(found, "CircularEval accuracy") == 50
    assert value(found, "accuracy of the first order") == 100
    cut = mmbench.measure_circular(rows[:3])  # a limit leaves the second one's first row
    assert cut[0].n == 1 and cut[0].value == 100 and cut[1].n == 2
    assert [m.name for m in mmbench.measure_circular(rows[:1])] == ["accuracy of the first order"]


def test_mme_adds_accuracy_and_accuracy_plus() -> None:
    def row(task: str, medium: str, said: str, right: str) -> GivenAnswer:
        key = f"{task}/{medium}/{right}"
        return give(said, right, key=key, labels={"task": task}, medium=medium)

    rows = [
        row("existence", "1", "Yes.", "Yes"),
        row("existence", "1", "No, it is not", "No"),
        row("existence", "2", "yes", "Yes"),
        row("existence", "2", "maybe no", "No"),  # behind the fourth letter: wrong
        row("code_reasoning", "1", "yes", "Yes"),
        row("code_reasoning", "1", "yesno", "No"),
    ]
    found = mme.measure_mme(rows)
    assert value(found, "perception") == pytest.approx(75 + 50)
    assert value(found, "cognition") == pytest.approx(50)
    assert found[0].n == 4 and found[0].split("task")["existence"].value == pytest.approx(125)
    low, high = found[0].compute_interval().low, found[0].compute_interval().high
    assert low < 125 < high <= 200
    (cut,) = mme.measure_mme(rows[1:3])  # half of two pictures: right, but none is right as a whole
    assert cut.value == 100


def test_exact_match_and_the_rule_of_the_references_script() -> None:
    assert exact.match_gqa("Left.", ["left"]) and not exact.match_gqa("left one", ["left"])
    assert exact.match_strict("A Dog!", ["a dog"]) and not exact.match_strict("", [""])
    assert exact.match_reference_script("", ["dog"])  # an empty answer is always right there
    assert exact.match_reference_script("two dogs", ["dog"])
    assert not exact.match_reference_script("cat", ["dog"])
    found = exact.measure_msvd([give("", "dog"), give("dog", "dog", key="2")])
    assert [m.value for m in found] == [50, 100]
    assert exact.match_numbers("2", ["two"]) and exact.match_numbers("14", ["more than ten"])
    assert not exact.match_numbers("3", ["two"])


def test_classes_are_found_in_sentences() -> None:
    classes = ("office", "home office", "bedroom")
    assert exact.find_class("This is a Home Office.", classes) == "home office"
    assert exact.find_class("an office", classes) == "office"
    assert exact.find_class("bedroom or office", classes) == ""
    assert exact.find_class("officers", classes) == ""


def test_three_people() -> None:
    rows = [give("rain", "rain", "wind", "storm"), give("no", "no", "no", "yes", key="2")]
    found = {m.name: (m.n, m.value) for m in people.measure_people(rows)}
    assert found["exact match (any)"] == (2, 100)
    assert found["exact match (majority)"] == (1, 100)
    assert "exact match (unanimous)" not in found
    for kind, right in (("yes or no", 2), ("one word", 1)):
        n, share = found[f"each person's answer ({kind})"]
        assert n == 1 and share == pytest.approx(100 * right / 3)


@pytest.fixture(scope="module")
def captions() -> list[Measure]:
    recorded = load("captions")
    rows = [
        give(recorded["predictions"][key], *references, key=key)
        for key, references in recorded["references"].items()
    ]
    names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
    try:
        return coco_captions.make_caption_measure(names)(rows)
    except coco_captions.NotComputedError as error:
        pytest.skip(str(error))


def test_captions_are_scored_as_by_pycocoevalcap(captions: list[Measure]) -> None:
    for name, expected in load("captions")["scores"].items():
        assert value(captions, name) == pytest.approx(expected, rel=1e-6), name


def test_meteor_is_that_of_the_whole_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program's first number, from summed counts; the mean of the captions is another one."""

    class Meteor:
        def compute_score(self, *tokens: Any) -> tuple[float, list[float]]:
            return 0.25, [0.1, 0.2, 0.6]

    module = SimpleNamespace(Meteor=Meteor)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", module)
    monkeypatch.setattr(coco_captions, "tokenize", dict)
    coco_captions._tokenize_all.cache_clear()
    rows = [give(f"dog {i}", "a dog", key=str(i)) for i in range(3)]
    (found,) = coco_captions.make_caption_measure(["METEOR"])(rows)
    interval = found.compute_interval()
    assert found.value == pytest.approx(25) and interval.low < 25 < interval.high
    assert found.rows[:, 0].tolist() == [0.1, 0.2, 0.6]


def test_intervals_of_captions_are_those_of_draws(captions: list[Measure]) -> None:
    bleu = next(m for m in captions if m.name == "BLEU-1")
    drawn = bleu.draw()
    assert np.array_equal(drawn, bleu.draw()), "the same draws each time"
    interval = bleu.compute_interval()
    assert interval.low < bleu.value < interval.high


def test_nothing_is_computed_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(coco_captions.NotComputedError, match="no Java"):
        coco_captions.tokenize({"1": ["a"]})


def test_a_share_has_wilsons_interval_and_a_table_adds_up() -> None:
    values = {str(i): float(i % 4 > 0) for i in range(40)}
    measure = Measure.from_values("accuracy", values, {"kind": ["a", "b"] * 20})
    interval = measure.compute_interval()
    assert (measure.value, measure.n) == (75, 40)
    assert (round(interval.low, 1), round(interval.high, 1)) == (59.8, 85.8)
    parts = measure.split("kind")
    assert {k: (p.n, p.value) for k, p in parts.items()} == {"a": (20, 50), "b": (20, 100)}
    assert measure.keep({"0", "1"}).value == 50
    graded = Measure.from_values("x", dict.fromkeys(values, 0.0), graded=True)
    assert graded.compute_interval().high == 0
