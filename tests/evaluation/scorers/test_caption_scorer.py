"""Caption scores against values worked out by hand or taken from tables."""

from __future__ import annotations

import numpy as np
import pytest

from onellm_dist.evaluation.scorers.captions import (
    Interval,
    bootstrap_mean,
    compute_chance,
    draw_derangement,
    exact_match,
    normalise_text,
    score_captions,
    score_shuffled,
    token_f1,
    wilson_interval,
)


def test_normalising_ignores_case_punctuation_and_spaces() -> None:
    assert normalise_text("  A red,  Circle. ") == "a red circle"
    assert exact_match("A red circle.", "a  red circle") == 1.0
    assert exact_match("a red square", "a red circle") == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("a red circle", "a red circle", 1.0),
        ("a red square", "a red circle", 2 / 3),
        ("red", "a red circle", 0.5),  # precision 1, recall 1/3
        ("red red red", "a red circle", 1 / 3),  # a repeated word counts once
        ("blue", "a red circle", 0.0),
        ("", "a red circle", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1_known_values(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected)


def test_wilson_known_values() -> None:
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = wilson_interval(successes, n)
        assert interval.low == pytest.approx(low, abs=5e-5)
        assert interval.high == pytest.approx(high, abs=5e-5)
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0, 0)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(3).uniform(size=400)
    interval = bootstrap_mean(list(values), seed=1)
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.004)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.004)
    assert bootstrap_mean(list(values), seed=1) == interval


def test_above_needs_the_whole_interval() -> None:
    assert Interval(0.8, 0.7, 0.9).is_above(Interval(0.5, 0.4, 0.69))
    assert not Interval(0.8, 0.7, 0.9).is_above(Interval(0.5, 0.4, 0.7))


@pytest.mark.parametrize("n", [2, 3, 100])
def test_derangement_moves_every_place(n: int) -> None:
    order = draw_derangement(n, seed=n)
    assert sorted(order) == list(range(n))
    assert all(i != j for i, j in enumerate(order))
    with pytest.raises(ValueError, match="two places"):
        draw_derangement(1, 0)


def test_control_separates_reading_from_guessing() -> None:
    references = [f"{a} {b}" for a in "xyz" for b in "uvw"] * 12
    reads, guesses = (
        score_captions(references, references),
        score_captions(["x u"] * len(references), references),
    )
    assert reads.exact_match.mean == 1.0
    assert reads.token_f1.is_above(score_shuffled(references, references).token_f1)
    # A model that always gives the same answer scores exactly the same on shuffled inputs.
    assert score_shuffled(["x u"] * len(references), references) == guesses


def test_chance_is_the_mean_over_candidates() -> None:
    candidates = ["a b", "a c", "d e", "d c"]
    exact, f1 = compute_chance(["a b", "a b", "d c"], candidates)
    assert exact == pytest.approx(0.25)
    # "a b": 1, .5, 0, 0 -> .375 ; "d c": 0, .5, .5, 1 -> .5
    assert f1 == pytest.approx((0.375 * 2 + 0.5) / 3)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2"):
        score_captions(["a"], ["a", "b"])
