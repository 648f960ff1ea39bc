"""What `train.loss: dpo` can be combined with; everything else is refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from onellm_dist.common.errors import UsageError
from onellm_dist.config.load import load_recipe

GOOD = [
    "train.loss=dpo",
    "data.preference_pairs=true",
    "data.text_format=conversation",
    "train.stage=tune",
    "train.lora={rank: 2}",
]


def load(*changes: str) -> Any:
    return load_recipe("toy/align_image", [*GOOD, *changes]).config


def test_defaults_are_those_of_the_paper() -> None:
    found = load().train.preference
    assert (found.beta, found.label_smoothing, found.reference) == (0.1, 0.0, "adapter")
    found = load("train.dpo={beta: 0.3, reference: copy}", "train.lora=null").train.preference
    assert (found.beta, found.reference) == (0.3, "copy")
    assert load_recipe("toy/align_image", []).config.train.preference is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.preference_pairs=false"], "needs data.preference_pairs=true"),
        (["train.loss=cross_entropy"], "data.preference_pairs=true needs train.loss=dpo"),
        (
            ["train.loss=cross_entropy", "data.preference_pairs=false", "train.dpo={beta: 1}"],
            "train.dpo is read with train.loss=dpo alone",
        ),
        (["data.text_format=caption"], "has no answers to compare"),
        (["train.lora=null"], "set train.dpo.reference=copy"),
        (["train.dpo={reference: copy}"], "is the reference already"),
        (
            ["train.lora=null", "train.dpo={reference: copy}", "engine.frozen_weights=int8"],
            "the copy would be rounded",
        ),
        (["train.compile=blocks"], "have not been shown to give the same"),
        (
            ["data.validation={split: test, samples: 2, every: 1, generate: 1}"],
            "a pair has two answers",
        ),
        (["train.dpo={beta: 0}"], "train.dpo.beta"),
        (["train.dpo={label_smoothing: 0.5}"], "train.dpo.label_smoothing"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: list[str], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        load(*changes)
    assert words in str(refused.value)
