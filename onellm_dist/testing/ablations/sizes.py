"""How much an ablation trains: all, few steps of all modalities, images alone, next to nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WEIGHTS = {"image": 3, "video": 4, "audio": 5}
"""Shares of the joint training, as in the demo."""


@dataclass(frozen=True)
class AblationSize:
    """Sizes of the datasets, the towers and the runs."""

    name: str
    train: Mapping[str, int]
    """Training samples of each modality."""
    test: int
    """Samples of each modality in each of the two test splits."""
    clip: tuple[str, ...]
    """Keys of the toy CLIP's pretraining."""
    dino: tuple[str, ...]
    """Keys of the pretraining of the encoder that sees no captions."""
    llm: tuple[str, ...]
    """Keys of the toy LLM's pretraining."""
    image_steps: int
    """Steps of the alignment with images."""
    joint_steps: int
    """Steps of the joint training behind it; a multiple of the sum of WEIGHTS, or 0: none."""
    least_quality: bool = True
    """Whether towers that are too weak to learn from end the ablation."""
    ranks: int | None = None
    """Ranks of a training run; default: as many as the demo's."""
    note: str = ""
    """What the page says of this size."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that are trained and tested."""
        return tuple(self.train)

    def get_share(self, modality: str) -> int:
        """Steps of the joint training that a modality takes part in, were it alone in them."""
        return self.joint_steps * WEIGHTS[modality] // sum(WEIGHTS.values())


FULL = AblationSize(
    "full",
    train={"image": 4000, "video": 2500, "audio": 3000},
    test=200,
    clip=("images=36000",),
    dino=("images=36000",),
    llm=("steps=120",),
    image_steps=160,
    joint_steps=240,
)
QUICK = AblationSize(
    "quick",
    train={"image": 4000},
    test=200,
    clip=FULL.clip,
    dino=FULL.dino,
    llm=FULL.llm,
    image_steps=64,
    joint_steps=0,
    ranks=1,
    note="Images alone, and the alignment with them cut to 64 steps: nothing is trained jointly, "
    "so that joint training and initialisation cannot be compared.",
)
SHORT = AblationSize(
    "short",
    train=FULL.train,
    test=80,
    clip=FULL.clip,
    dino=FULL.dino,
    llm=FULL.llm,
    image_steps=QUICK.image_steps,
    joint_steps=60,
    ranks=1,
    note="All three modalities, for few steps: 64 of images, then 60 of all. No model is done "
    "learning, so a variant that learns faster has the better score.",
)
TINY = AblationSize(
    "tiny",
    train={"image": 64, "video": 48, "audio": 48},
    test=4,
    clip=("images=128", "bank=64", "batch=32"),
    dino=("images=128", "bank=64", "batch=32"),
    llm=("steps=2",),
    image_steps=2,
    joint_steps=12,
    least_quality=False,
    note="Too small to learn anything: it shows that the queue works.",
)
SIZES = {size.name: size for size in (FULL, SHORT, QUICK, TINY)}
