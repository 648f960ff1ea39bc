"""The sizes of the demo: how much is rendered, pretrained and trained, and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onellm_dist.shards.sources.toyworld.world import MODALITIES


@dataclass(frozen=True)
class RunScale:
    """Size of one training run.

    Attributes:
        recipe: name of a recipe that ships.
        steps: optimizer steps.
        step_seconds: seconds of one step on two idle cores of the reference machine.
        overrides: further keys of the recipe.
    """

    recipe: str
    steps: int
    step_seconds: float
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class DemoScale:
    """Everything that differs between `onellm demo` and `onellm demo --full`.

    Attributes:
        train: training samples of each modality in the shards.
        test: samples of each modality in each of the two test splits (at least 100).
        clip: overrides of the toy CLIP's pretraining.
        llm: overrides of the toy LLM's pretraining.
        runs: the training runs in order: align (image), align (all), tune.
        shards_seconds: seconds to build the shards on one idle core of the reference machine.
        clip_seconds: seconds to pretrain the toy CLIP on such a core.
        llm_seconds: seconds to pretrain the toy LLM on such a core.
        caption_seconds: seconds to caption the test splits on such a core.
    """

    train: Mapping[str, int]
    test: int
    clip: tuple[str, ...]
    llm: tuple[str, ...]
    runs: tuple[RunScale, RunScale, RunScale]
    shards_seconds: float
    clip_seconds: float
    llm_seconds: float
    caption_seconds: float


_BF16 = "train.precision=bf16"

QUICK = DemoScale(
    train={**dict.fromkeys(MODALITIES, 1500), "image": 4000, "imu": 3000},
    test=120,
    clip=("images=36000",),
    llm=("steps=120",),
    runs=(
        RunScale("toy/align_image", 160, 0.36, (_BF16, "checkpoint.every=16")),
        RunScale("toy/align_all", 540, 1.6, (_BF16, "checkpoint.every=150")),
        RunScale("toy/tune", 40, 0.6, (_BF16, "checkpoint.every=20")),
    ),
    shards_seconds=80,
    clip_seconds=110,
    llm_seconds=42,
    caption_seconds=60,
)

FULL = DemoScale(
    train={**dict.fromkeys(MODALITIES, 5000), "image": 8000, "audio": 8000, "imu": 8000},
    test=400,
    clip=("images=60000", "bank=12000"),
    llm=("steps=240",),
    runs=(
        RunScale("toy/align_image", 500, 0.36, (_BF16, "checkpoint.every=50")),
        RunScale("toy/align_all", 1400, 1.5, (_BF16, "checkpoint.every=100")),
        RunScale("toy/tune", 120, 0.7, (_BF16, "checkpoint.every=40")),
    ),
    shards_seconds=250,
    clip_seconds=180,
    llm_seconds=80,
    caption_seconds=200,
)
