"""Rendering of one sample of the toy world: media, caption, attributes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from onellm_dist.shards.sources.toyworld import (
    audio,
    draws,
    fmri,
    image,
    imu,
    maps,
    point,
    video,
    world,
)

_RENDERERS: dict[str, Callable[[world.Attributes, np.random.Generator], draws.RenderedMedia]] = {
    "image": image.render,
    "video": video.render,
    "audio": audio.render,
    "point": point.render,
    "depth": maps.render_depth,
    "normal": maps.render_normal,
    "imu": imu.render,
    "fmri": fmri.render,
}


class ToySample(NamedTuple):
    """A complete sample.

    Attributes:
        key: its key in the shards.
        parts: extension to bytes: media, `txt`, `json`.
        caption: the right answer.
        attributes: attribute name to value.
    """

    key: str
    parts: dict[str, bytes]
    caption: str
    attributes: dict[str, str]


def render_sample(modality: str, split: str, index: int, seed: int = 0) -> ToySample:
    """Render sample `index` of a split (draws.SPLITS), as a pure function of the arguments.

    Raises:
        UsageError: the modality or the split is unknown.
    """
    attributes = draws.choose_attributes(modality, split, index, seed)
    rendered = _RENDERERS[modality](attributes, draws.make_rng(modality, split, index, seed))
    caption = world.make_caption(modality, attributes)
    record: dict[str, Any] = {
        "caption": caption,
        "attributes": attributes,
        "conversations": world.make_conversation(modality, caption),
    }
    if rendered.facts:
        record["facts"] = rendered.facts
    text = {"txt": caption.encode(), "json": json.dumps(record).encode()}
    return ToySample(
        f"{modality}_{split}_{index:06d}", {**rendered.parts, **text}, caption, attributes
    )
