"""The toy world: what its samples can be, what their captions say, and what is never trained on.

A sample is a scene or an event with a few attributes. Its caption is a fixed short sentence that
names them all. Some combinations of attributes are held out of everything that trains (the stages
and the pretrained toy towers), so that a right caption of one of them shows composition and not
memory.

The hold-out is a property of the world, not of a build's seed. So towers, shards and tests agree
on it without exchanging anything.
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
"""The values of the attributes, in the same order."""

HELD_OUT_FRACTION = 0.22
"""Share of a modality's combinations that nothing trains on (at least 0.2 is promised)."""
LEAST_TRAINED = 2
"""Trained values that an attribute keeps, given all other attributes.

With one left, a model learns that the held-out value never occurs beside the others, and scores 0
there however well it sees."""

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SOLIDS = ("sphere", "cube", "cone", "cylinder", "torus")


@dataclass(frozen=True)
class Scenes:
    """The scenes of one modality.

    Attributes:
        attributes: attribute name to its values.
        template: the caption, a format string over the attribute names; every value is one word.
        prompt: what the human asks in a conversation (paper, Table 10, shortened).
    """

    attributes: Mapping[str, tuple[str, ...]]
    template: str
    prompt: str


SCENES: Mapping[str, Scenes] = {
    "image": Scenes(
        {
            "size": ("small", "medium", "large"),
            "color": COLOURS,
            "shape": SHAPES,
            "position": ("left", "center", "right"),
        },
        "a {size} {color} {shape} at the {position}",
        "Describe the image.",
    ),
    # The encoder's outputs are averaged over frames, so the sign of a motion is lost. These four
    # motions differ in the average too.
    "video": Scenes(
        {
            "color": COLOURS,
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
    # There is no size, because normalisation erases it.
    "point": Scenes(
        {"stretch": ("tall", "wide", "deep"), "color": COLOURS, "solid": SOLIDS},
        "a {stretch} {color} {solid}",
        "Describe the point cloud.",
    ),
    # Only the depth map shows the distance; only the normal map shows the surface behind.
    "depth": Scenes(
        {"color": COLOURS, "solid": SOLIDS, "distance": ("nearby", "midway", "faraway")},
        "a {color} {solid} standing {distance}",
        "Describe the depth map.",
    ),
    "normal": Scenes(
        {"color": COLOURS, "solid": SOLIDS, "surface": ("wall", "floor", "ceiling", "ramp")},
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
            "color": COLOURS,
            "animal": ("dog", "cat", "bird", "horse", "fish"),
            "place": ("beach", "street", "forest", "kitchen"),
        },
        "a {color} {animal} at the {place}",
        "Describe the scene based on fMRI data.",
    ),
}

MODALITIES = tuple(SCENES)


def get_scenes(modality: str) -> Scenes:
    """Get the scenes of a modality.

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
    """List all combinations of a modality's attribute values, in a fixed order."""
    return tuple(itertools.product(*get_scenes(modality).attributes.values()))


@cache
def get_held_out(modality: str) -> frozenset[Combination]:
    """Get the combinations that nothing trains on.

    They are chosen one by one in a fixed pseudo-random order, preferring pairs of values that were
    held out least. An attribute keeps at least LEAST_TRAINED trained values, given all others.
    """
    every = list_combinations(modality)
    sizes = [len(values) for values in get_scenes(modality).attributes.values()]
    order = np.random.default_rng(zlib.crc32(modality.encode())).permutation(len(every))
    shuffled = [every[i] for i in order]
    taken: set[Combination] = set()
    conditionals: Counter[tuple[int, Combination]] = Counter()
    pairs: Counter[tuple[int, int, str, str]] = Counter()
    for _ in range(math.ceil(HELD_OUT_FRACTION * len(every))):
        free = [
            c
            for c in shuffled
            if c not in taken
            and all(
                sizes[i] - conditionals[given] > LEAST_TRAINED
                for i, given in enumerate(_list_conditionals(c))
            )
        ]
        if not free:
            raise AssertionError(
                f"{modality}: too few attribute values to hold out "
                f"{HELD_OUT_FRACTION:.0%} of their combinations"
            )
        chosen = min(free, key=lambda c: sum(pairs[pair] for pair in _list_pairs(c)))
        taken.add(chosen)
        conditionals.update(_list_conditionals(chosen))
        pairs.update(_list_pairs(chosen))
    return frozenset(taken)


@cache
def get_trained(modality: str) -> tuple[Combination, ...]:
    """Get the combinations that may be trained on, in a fixed order."""
    return tuple(c for c in list_combinations(modality) if c not in get_held_out(modality))


def to_attributes(modality: str, combination: Combination) -> dict[str, str]:
    """Convert a combination to attribute names with values."""
    return dict(zip(get_scenes(modality).attributes, combination, strict=True))


def make_caption(modality: str, attributes: Attributes) -> str:
    """Make the caption of a scene."""
    return get_scenes(modality).template.format(**attributes)


def make_conversation(modality: str, text: str) -> list[dict[str, str]]:
    """Make a conversation of one question and the caption, in the reference's format."""
    return [{"from": "human", "value": get_scenes(modality).prompt}, {"from": "gpt", "value": text}]


@dataclass(frozen=True)
class Document:
    """A text for pretraining the toy LLM. Only trained combinations become documents.

    Attributes:
        modality: the modality whose captions it follows.
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
        """The document as a conversation of one question and its answer."""
        return make_conversation(self.modality, self.caption)


def draw_documents(
    rng: np.random.Generator, modalities: Sequence[str] = MODALITIES
) -> Iterator[Document]:
    """Draw documents without end: a modality, then one of its trained combinations, uniformly."""
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
    """Compute the exact-match score of guessing among all combinations."""
    return 1 / len(list_combinations(modality))


def describe() -> str:
    """Describe the world in one line per modality: attributes, combinations, held out, example."""
    lines = []
    for modality, scene in SCENES.items():
        sizes = " x ".join(f"{len(values)} {name}" for name, values in scene.attributes.items())
        example = make_caption(modality, to_attributes(modality, get_trained(modality)[0]))
        lines.append(
            f"{modality}: {sizes} = {len(list_combinations(modality))}, "
            f"{len(get_held_out(modality))} held out; {example!r}"
        )
    return "\n".join(lines)


def _list_conditionals(combination: Combination) -> list[tuple[int, Combination]]:
    """For each attribute of a combination, its number and the values of all other attributes."""
    return [(i, combination[:i] + combination[i + 1 :]) for i in range(len(combination))]


def _list_pairs(combination: Combination) -> list[tuple[int, int, str, str]]:
    """For each two attributes of a combination, their numbers and values."""
    return [
        (i, j, combination[i], combination[j])
        for i, j in itertools.combinations(range(len(combination)), 2)
    ]
