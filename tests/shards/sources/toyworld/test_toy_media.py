"""Every modality's media: they decode, are deterministic, and show what the caption says."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import toy_readers as readers

from onellm_dist.modalities import get_modality
from onellm_dist.shards.sources.toyworld import point, render_sample, world
from onellm_dist.shards.sources.toyworld.solids import compute_distance, sample_surface

READERS: dict[str, dict[str, Callable[[np.ndarray], str]]] = {
    "image": {"color": readers.image_colour, "position": readers.image_position},
    "video": {"color": readers.video_colour, "motion": readers.video_motion},
    "audio": {"loudness": readers.audio_loudness, "rhythm": readers.audio_rhythm},
    "point": {"stretch": readers.point_stretch, "color": readers.point_colour},
    "depth": {"color": readers.pair_colour, "distance": readers.depth_distance},
    "normal": {"color": readers.pair_colour, "surface": readers.normal_surface},
    "imu": {"lean": readers.imu_lean, "activity": readers.imu_activity, "pace": readers.imu_pace},
    "fmri": {
        name: readers.fmri_value(values)
        for name, values in world.get_scenes("fmri").attributes.items()
    },
}
SAMPLES = 14


@pytest.mark.parametrize("modality", world.MODALITIES)
@pytest.mark.parametrize("split", ["train", "test_held_out"])
@pytest.mark.seconds
def test_the_media_show_the_attributes(modality: str, split: str) -> None:
    wrong = []
    for index in range(SAMPLES):
        value, attributes = readers.value_of(modality, split, index)
        read = {name: reader(value) for name, reader in READERS[modality].items()}
        if read != {name: attributes[name] for name in read}:
            wrong.append((index, attributes, read))
    assert wrong == []


def test_sizes_are_ordered_and_apart() -> None:
    areas: dict[str, list[int]] = {"small": [], "medium": [], "large": []}
    for index in range(60):
        value, attributes = readers.value_of("image", "train", index)
        if attributes["shape"] == "circle":
            areas[attributes["size"]].append(int((np.abs(value).max(0) > 0.3).sum()))
    assert max(areas["small"]) < 0.8 * min(areas["medium"])
    assert max(areas["medium"]) < 0.8 * min(areas["large"])


@pytest.mark.parametrize("modality", world.MODALITIES)
@pytest.mark.seconds
def test_rendering_is_a_pure_function(modality: str) -> None:
    first = render_sample(modality, "train", 5, seed=1)
    render_sample(modality, "train", 6, seed=1)
    assert render_sample(modality, "train", 5, seed=1) == first
    media = [e for e in first.parts if e not in ("txt", "json")]
    for other in (
        render_sample(modality, "train", 5, seed=2),
        render_sample(modality, "test_seen", 5, seed=1),
        render_sample(modality, "pretrain", 5, seed=1),
    ):
        assert all(other.parts[e] != first.parts[e] for e in media)
    lap = len(world.get_trained(modality))
    again = next(
        s
        for s in (render_sample(modality, "train", i, 1) for i in range(lap, 2 * lap))
        if s.caption == first.caption
    )
    assert all(again.parts[e] != first.parts[e] for e in media), "the same scene is drawn anew"


@pytest.mark.parametrize("modality", world.MODALITIES)
def test_parts_are_the_modality_and_the_text(modality: str) -> None:
    sample = render_sample(modality, "test_held_out", 0)
    media = get_modality(modality).match(set(sample.parts))
    assert set(sample.parts) == {*media.values(), "txt", "json"}
    assert (
        sample.parts["txt"].decode()
        == sample.caption
        == world.make_caption(modality, sample.attributes)
    )
    record = json.loads(sample.parts["json"])
    assert record["caption"] == sample.caption
    assert record["attributes"] == sample.attributes
    assert record["conversations"] == [
        {"from": "human", "value": world.get_scenes(modality).prompt},
        {"from": "gpt", "value": sample.caption},
    ]
    assert tuple(sample.attributes.values()) in world.get_held_out(modality)


def test_the_picture_does_not_show_what_the_map_is_for() -> None:
    """Apparent size is drawn by lot: it does not go with the distance."""
    sizes: dict[str, list[int]] = {}
    for index in range(45):
        value, attributes = readers.value_of("depth", "train", index)
        sizes.setdefault(attributes["distance"], []).append(
            int((np.abs(value[0]).max(0) > 0.3).sum())
        )
    means, spread = (
        [np.mean(s) for s in sizes.values()],
        np.std(np.concatenate(list(sizes.values()))),
    )
    assert np.ptp(means) < spread


def test_crops_of_a_video_differ() -> None:
    value, _ = readers.value_of("video", "train", 0)
    shown = next(i for i in range(5) if np.abs(value[3 * i]).max() > 0.3)
    left, centre, right = value[3 * shown : 3 * shown + 3]
    assert not np.array_equal(left, centre)
    assert not np.array_equal(centre, right)


def test_point_colours_show_places_on_the_surface() -> None:
    """Groups of neighbours in colour lie at different places; else all tokens would be alike."""
    value, _ = readers.value_of("point", "train", 2)
    centres = np.random.default_rng(0).choice(point.POINTS, 40, replace=False)
    groups = [
        value[np.argsort(np.abs(value[:, 3:] - value[centre, 3:]).sum(1))[:32], :3]
        for centre in centres
    ]
    between = np.std([group.mean(0) for group in groups], axis=0)
    assert (between > 0.5 * value[:, :3].std(0)).all()
    assert len(np.unique(value[:, 3:], axis=0)) > 1024, "farthest points need that many colours"


@pytest.mark.parametrize("solid", world.SOLIDS)
def test_sampled_surface_and_ray_caster_agree_on_the_solid(solid: str) -> None:
    points, normals = sample_surface(solid, 2000, np.random.default_rng(0))
    assert np.abs(compute_distance(solid, points)).max() < 1e-9
    assert np.allclose(np.linalg.norm(normals, axis=1), 1)
    assert (compute_distance(solid, points + 0.01 * normals) > 0).mean() > 0.99
    assert (compute_distance(solid, points - 0.01 * normals) < 0).mean() > 0.99
