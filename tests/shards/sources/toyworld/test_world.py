"""The toy world's promises: attributes, hold-out, captions, documents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from toy_captions import parse_caption

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.sources.toyworld import draws, world

EVERY = pytest.mark.parametrize("modality", world.MODALITIES)


def test_the_world_has_every_modality_of_the_package() -> None:
    assert set(world.MODALITIES) == set(all_modalities())


@EVERY
def test_three_attributes_of_three_values(modality: str) -> None:
    attributes = world.get_scenes(modality).attributes
    assert len(attributes) >= 3
    assert all(len(set(values)) == len(values) >= 3 for values in attributes.values())


@EVERY
def test_a_fifth_is_held_out_and_every_conditional_keeps_two_trained_values(modality: str) -> None:
    every, trained, held = (
        set(world.list_combinations(modality)),
        set(world.get_trained(modality)),
        world.get_held_out(modality),
    )
    assert trained | held == every
    assert not trained & held
    assert len(held) / len(every) >= 0.2
    sizes = list(world.get_scenes(modality).attributes.values())
    for place, values in enumerate(sizes):
        for others in itertools.product(*(v for i, v in enumerate(sizes) if i != place)):
            line = [(*others[:place], value, *others[place:]) for value in values]
            assert sum(c in trained for c in line) >= 2, (
                f"{modality}: {others} leaves too few values of attribute {place}"
            )


@EVERY
def test_the_hold_out_is_spread_over_all_values(modality: str) -> None:
    held = world.get_held_out(modality)
    for place, values in enumerate(world.get_scenes(modality).attributes.values()):
        counts = [sum(c[place] == value for c in held) for value in values]
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= max(2, len(held) // len(values))


def test_no_caption_is_both_trained_and_held_out_in_any_two_modalities() -> None:
    def captions(pick: Callable[[str], Iterable[world.Combination]]) -> set[str]:
        return {
            world.make_caption(m, world.to_attributes(m, c))
            for m in world.MODALITIES
            for c in pick(m)
        }

    assert not captions(world.get_trained) & captions(world.get_held_out)
    assert len(captions(world.list_combinations)) == sum(
        len(world.list_combinations(m)) for m in world.MODALITIES
    )


@EVERY
def test_a_caption_says_every_attribute(modality: str) -> None:
    for combination in world.list_combinations(modality):
        attributes = world.to_attributes(modality, combination)
        assert parse_caption(modality, world.make_caption(modality, attributes)) == attributes


def test_parse_of_a_wrong_answer() -> None:
    assert parse_caption("video", "a red dog") == {
        "color": "red",
        "shape": None,
        "motion": None,
    }
    assert parse_caption("video", "") == {"color": None, "shape": None, "motion": None}


def test_the_corpus_is_trained_combinations_only_and_covers_them_all() -> None:
    seen = {m: set() for m in world.MODALITIES}  # type: dict[str, set[str]]
    for document in itertools.islice(world.draw_documents(np.random.default_rng(0)), 20_000):
        seen[document.modality].add(document.caption)
        assert set(document.words) <= set(document.caption.split())
        assert document.conversations[1]["value"] == document.caption
    for modality in world.MODALITIES:
        assert seen[modality] == {
            world.make_caption(modality, world.to_attributes(modality, c))
            for c in world.get_trained(modality)
        }


@EVERY
@pytest.mark.parametrize("split", draws.SPLITS)
def test_splits_draw_from_their_own_combinations_evenly(modality: str, split: str) -> None:
    pool = (
        world.get_held_out(modality)
        if split == "test_held_out"
        else set(world.get_trained(modality))
    )
    drawn = [
        tuple(draws.choose_attributes(modality, split, i, seed=3).values())
        for i in range(2 * len(pool))
    ]
    assert set(drawn) == pool
    assert all(drawn.count(c) == 2 for c in pool)
    assert drawn[: len(pool)] != drawn[len(pool) :]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="smell"):
        world.get_scenes("smell")
    with pytest.raises(UsageError, match="validation"):
        draws.make_rng("image", "validation", 0, 0)


def test_description_names_every_modality() -> None:
    assert [line.split(":")[0] for line in world.describe().splitlines()] == list(world.MODALITIES)
