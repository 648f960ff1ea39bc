"""The toy world itself: what a sample of each modality can be, what its caption says, and what is never trained on.

A sample is a scene or an event given by a few attributes; its caption is a fixed short sentence that names them all. Some
combinations of attributes are held out of everything that trains (the stages and the stand-in towers), so that a right
caption of one of them means composition and not memory.

The hold-out is a property of the world, not of a build's seed: towers, shards and tests agree on it without talking.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from onellm_dist.common.errors import UsageError

Attributes = Mapping[str, str]
"""Attribute name to value, in the order of the modality's attributes."""
Combination = tuple[str, ...]
"""The values alone, in the same order."""

HELD_OUT_FRACTION = 0.22
"""Share of a modality's combinations that nothing trains on (the promise is at least 0.2)."""
LEAST_TRAINED = 2
"""Values that stay trained in every conditional. With one left, a model learns that the held-out value never occurs
beside the others and scores 0 there, however well it sees."""

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SOLIDS = ("sphere", "cube", "cone", "cylinder", "torus")


@dataclass(frozen=True)
class Scenes:
    """One modality's scenes.

    Attributes:
        attributes: attribute name to its values.
        template: the caption, a format string over the attribute names; every value is one word.
        prompt: what the human asks in the conversation form (paper, table 10, shortened).
    """

    attributes: Mapping[str, tuple[str, ...]]
    template: str
    prompt: str


SCENES: Mapping[str, Scenes] = {
    "image": Scenes(
        {
            "size": ("small", "medium", "large"),
            "color": COLORS,
            "shape": SHAPES,
            "position": ("left", "center", "right"),
        },
        "a {size} {color} {shape} at the {position}",
        "Describe the image.",
    ),
    # The encoder's outputs are averaged over frames, so the sign of a motion is lost: these four survive the average.
    "video": Scenes(
        {
            "color": COLORS,
            "shape": SHAPES,
            "motion": ("sliding", "bouncing", "blinking", "resting"),
        },
        "a {color} {shape} {motion}",
        "Describe the video.",
    ),
    "audio": Scenes(
        {
            "loudness": ("faint", "moderate", "loud"),
            "sound": ("tone", "hiss", "buzz", "siren", "rumble"),
            "rhythm": ("steadily", "once", "slowly", "quickly"),
        },
        "a {loudness} {sound} playing {rhythm}",
        "Describe the audio.",
    ),
    # No size: normalisation erases it.
    "point": Scenes(
        {"stretch": ("tall", "wide", "deep"), "color": COLORS, "solid": SOLIDS},
        "a {stretch} {color} {solid}",
        "Describe the point cloud.",
    ),
    # Only the depth map tells the distance, only the normal map tells the surface behind the object.
    "depth": Scenes(
        {"color": COLORS, "solid": SOLIDS, "distance": ("nearby", "midway", "faraway")},
        "a {color} {solid} standing {distance}",
        "Describe the depth map.",
    ),
    "normal": Scenes(
        {"color": COLORS, "solid": SOLIDS, "surface": ("wall", "floor", "ceiling", "ramp")},
        "a {color} {solid} by a {surface}",
        "Describe the normal map.",
    ),
    "imu": Scenes(
        {
            "activity": ("walking", "jumping", "turning", "nodding"),
            "pace": ("slowly", "steadily", "quickly"),
            "lean": ("left", "right", "forward", "back"),
        },
        "a person {activity} {pace} leaning {lean}",
        "Describe the motion.",
    ),
    "fmri": Scenes(
        {
            "color": COLORS,
            "animal": ("dog", "cat", "bird", "horse", "fish"),
            "place": ("beach", "street", "forest", "kitchen"),
        },
        "a {color} {animal} at the {place}",
        "Describe the scene based on fMRI data.",
    ),
}

MODALITIES = tuple(SCENES)


def get_scenes(modality: str) -> Scenes:
    """The scenes of a modality.

    Raises:
        UsageError: the toy world has no such modality.
    """
    try:
        return SCENES[modality]
    except KeyError:
        raise UsageError(
            f"the toy world has no modality {modality!r}",
            "nothing can be rendered.",
            f"use one of: {', '.join(SCENES)}.",
        ) from None


@cache
def list_combinations(modality: str) -> tuple[Combination, ...]:
    """All combinations of a modality's attribute values, in a fixed order."""
    return tuple(itertools.product(*get_scenes(modality).attributes.values()))


@cache
def get_held_out(modality: str) -> frozenset[Combination]:
    """The combinations that nothing trains on.

    Chosen one by one in a fixed pseudo-random order, the pairs of values that were held out least first, never leaving
    fewer than LEAST_TRAINED trained values of an attribute given all the others.
    """
    every = list_combinations(modality)
    sizes = [len(values) for values in get_scenes(modality).attributes.values()]
    order = np.random.default_rng(zlib.crc32(modality.encode())).permutation(len(every))
    raw_samples = [every[i] for i in order]
    taken: set[Combination] = set()
    lines: Counter[tuple[int, Combination]] = Counter()
    pairs: Counter[tuple[int, int, str, str]] = Counter()
    for _ in range(math.ceil(HELD_OUT_FRACTION * len(every))):
        free = [
            c
            for c in raw_samples
            if c not in taken
            and all(sizes[i] - lines[line] > LEAST_TRAINED for i, line in enumerate(_lines(c)))
        ]
        if not free:
            raise AssertionError(
                f"{modality}: attributes too small to hold out {HELD_OUT_FRACTION:.0%} of their combinations"
            )
        chosen = min(free, key=lambda c: sum(pairs[pair] for pair in _pairs(c)))
        taken.add(chosen)
        lines.update(_lines(chosen))
        pairs.update(_pairs(chosen))
    return frozenset(taken)


@cache
def get_trained(modality: str) -> tuple[Combination, ...]:
    """The combinations that may be trained on, in a fixed order."""
    return tuple(c for c in list_combinations(modality) if c not in get_held_out(modality))


def to_attributes(modality: str, combination: Combination) -> dict[str, str]:
    """Attribute name to value."""
    return dict(zip(get_scenes(modality).attributes, combination, strict=True))


def make_caption(modality: str, attributes: Attributes) -> str:
    """The caption of a scene."""
    return get_scenes(modality).template.format(**attributes)


def parse_caption(modality: str, text: str) -> dict[str, str | None]:
    """What a caption says of each attribute: the value that stands where the template has it, else None.

    Reads any text (a model wrote it): each word is compared with the template's word at its place.
    """
    words = text.split()
    said: dict[str, str | None] = {}
    for place, field in enumerate(get_scenes(modality).template.split()):
        if field.startswith("{"):
            values = get_scenes(modality).attributes[field[1:-1]]
            said[field[1:-1]] = (
                words[place] if place < len(words) and words[place] in values else None
            )
    return {name: said[name] for name in get_scenes(modality).attributes}


def make_conversation(modality: str, text: str) -> list[dict[str, str]]:
    """The caption as a conversation of one turn, in the reference's data format (facts of the instruction JSON files)."""
    return [{"from": "human", "value": get_scenes(modality).prompt}, {"from": "gpt", "value": text}]


@dataclass(frozen=True)
class Document:
    """One text for the stand-in LLM's pretraining. Only trained combinations become documents.

    Attributes:
        modality: whose grammar it is written in.
        words: the attribute values of the caption, in the caption's order.
        caption: the caption.
        prompt: the modality's question.
    """

    modality: str
    words: tuple[str, ...]
    caption: str
    prompt: str

    @property
    def conversations(self) -> list[dict[str, str]]:
        """The document as a conversation of one turn."""
        return make_conversation(self.modality, self.caption)


def draw_documents(
    rng: np.random.Generator, modalities: Sequence[str] = MODALITIES
) -> Iterator[Document]:
    """Documents without end: a modality, then one of its trained combinations, both uniformly drawn from `rng`."""
    while True:
        modality = modalities[int(rng.integers(len(modalities)))]
        pool = get_trained(modality)
        attributes = to_attributes(modality, pool[int(rng.integers(len(pool)))])
        text = make_caption(modality, attributes)
        yield Document(
            modality,
            tuple(w for w in text.split() if w in attributes.values()),
            text,
            get_scenes(modality).prompt,
        )


def compute_chance(modality: str) -> float:
    """Exact match of a guess among all combinations."""
    return 1 / len(list_combinations(modality))


def describe() -> str:
    """The world as text, one modality a line: attributes, combinations, held-out combinations, an example."""
    lines = []
    for modality, scene in SCENES.items():
        sizes = " x ".join(f"{len(values)} {name}" for name, values in scene.attributes.items())
        example = make_caption(modality, to_attributes(modality, get_trained(modality)[0]))
        lines.append(
            f"{modality}: {sizes} = {len(list_combinations(modality))}, {len(get_held_out(modality))} held out; {example!r}"
        )
    return "\n".join(lines)


def _lines(combination: Combination) -> list[tuple[int, Combination]]:
    """The conditionals a combination stands in: for each attribute, its place and the values of all others."""
    return [(i, combination[:i] + combination[i + 1 :]) for i in range(len(combination))]


def _pairs(combination: Combination) -> list[tuple[int, int, str, str]]:
    """The pairs of values of two attributes."""
    return [
        (i, j, combination[i], combination[j])
        for i, j in itertools.combinations(range(len(combination)), 2)
    ]
