"""The sizes of the demo: how much is rendered, pretrained and trained, and how long each part takes on the reference machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onellm_dist.shards.sources.toyworld.world import MODALITIES


@dataclass(frozen=True)
class Training:
    """One run of the trainer.

    Attributes:
        recipe: name of the recipe that ships.
        steps: optimizer steps.
        step_seconds: of one step on two idle reference cores.
        overrides: further keys of the recipe.
    """

    recipe: str
    steps: int
    step_seconds: float
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """Everything that differs between `onellm demo` and `onellm demo --full`.

    Attributes:
        train: training samples a modality in the shards.
        test: samples of each of the two test splits, a modality (at least 100).
        clip, llm: overrides of the stand-ins' recipes.
        stages: the trainer's runs, in order: align (image), align (all), tune.
        shards_seconds, clip_seconds, llm_seconds, caption_seconds: on one idle reference core.
    """

    train: Mapping[str, int]
    test: int
    clip: tuple[str, ...]
    llm: tuple[str, ...]
    stages: tuple[Training, Training, Training]
    shards_seconds: float
    clip_seconds: float
    llm_seconds: float
    caption_seconds: float
    notes: tuple[str, ...] = field(default=())


_BF16 = "train.precision=bf16"

QUICK = Scale(
    train={**dict.fromkeys(MODALITIES, 1500), "image": 4000, "imu": 3000},
    test=120,
    clip=("images=36000",),
    llm=("steps=120",),
    stages=(
        Training("toy/align_image", 160, 0.36, (_BF16, "checkpoint.every=16")),
        Training("toy/align_all", 540, 1.6, (_BF16, "checkpoint.every=150")),
        Training("toy/tune", 40, 0.6, (_BF16, "checkpoint.every=20")),
    ),
    shards_seconds=80,
    clip_seconds=110,
    llm_seconds=42,
    caption_seconds=60,
)

FULL = Scale(
    train={**dict.fromkeys(MODALITIES, 5000), "image": 8000, "audio": 8000, "imu": 8000},
    test=400,
    clip=("images=60000", "bank=12000"),
    llm=("steps=240",),
    stages=(
        Training("toy/align_image", 500, 0.36, (_BF16, "checkpoint.every=50")),
        Training("toy/align_all", 1400, 1.5, (_BF16, "checkpoint.every=100")),
        Training("toy/tune", 120, 0.7, (_BF16, "checkpoint.every=40")),
    ),
    shards_seconds=250,
    clip_seconds=180,
    llm_seconds=80,
    caption_seconds=200,
)
