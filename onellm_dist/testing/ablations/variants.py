"""What the paper's ablations vary (arXiv 2312.03700, Tables 7 and 8), and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from onellm_dist.common.errors import UsageError

MODALITIES = ("image", "video", "audio")
"""Tables 7 and 8 train these alone."""
PAPER_COLUMNS = ("NoCaps", "VQAv2", "ClothoAQA", "MSVD-QA")
COMPARED = {"image": "NoCaps", "video": "MSVD-QA", "audio": "ClothoAQA"}
"""Modality of the toy world -> the paper's column beside it."""
DEFAULT = "default"


@dataclass(frozen=True)
class Variant:
    """One model of the ablations: what differs from the default."""

    name: str
    title: str
    paper: tuple[float, float, float, float]
    """The paper's scores, in the order of PAPER_COLUMNS."""
    training: Literal["joint", "separate"] = "joint"
    """Whether all modalities train one model, or each a model of its own."""
    init: Literal["image", "random"] = "image"
    """What the joint training starts from: a model aligned with images, or random weights."""
    encoder: Literal["clip", "dino"] = "clip"
    """What the encoder was pretrained with."""
    trains_encoder: bool = False
    upm: Mapping[str, int | str] = field(default_factory=dict)
    """Keys of the UPM's config."""

    @property
    def needs_joint(self) -> bool:
        """Whether the variant differs from the default only in joint training of modalities."""
        return self.training == "separate" or self.init == "random"


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(DEFAULT, "the paper's model", (115.8, 71.6, 57.4, 56.8)),
        Variant("separate", "separate", (115.6, 71.9, 37.8, 31.0), training="separate"),
        Variant("random-init", "random", (98.8, 65.6, 57.6, 53.1), init="random"),
        Variant("experts-1", "1", (108.7, 66.9, 58.2, 53.3), upm={"experts": 1}),
        Variant("experts-5", "5", (114.6, 71.7, 58.2, 56.7), upm={"experts": 5}),
        Variant("experts-7", "7", (114.9, 71.6, 58.8, 56.0), upm={"experts": 7}),
        Variant(
            "router-constant", "constant", (109.8, 67.7, 56.2, 55.3), upm={"router": "constant"}
        ),
        Variant("router-sparse", "sparse", (112.8, 71.1, 56.7, 55.7), upm={"router": "sparse"}),
        Variant("encoder-trained", "CLIP, trained", (106.0, 69.1, 62.1, 53.6), trains_encoder=True),
        Variant("encoder-dino", "DINOv2-like, frozen", (104.6, 67.0, 56.8, 54.7), encoder="dino"),
    )
}
"""Name -> variant, in the order in which they are trained."""


@dataclass(frozen=True)
class TablePart:
    """One part of the paper's tables."""

    title: str
    table: str
    rows: Mapping[str, str]
    """Variant -> how the part calls it, in the paper's order."""


TABLE_PARTS = (
    TablePart("Training", "Table 7a", {"separate": "separate", DEFAULT: "joint"}),
    TablePart("Initialisation", "Table 7b", {"random-init": "random", DEFAULT: "from image"}),
    TablePart(
        "Experts",
        "Table 7c",
        {"experts-1": "1", DEFAULT: "3", "experts-5": "5", "experts-7": "7"},
    ),
    TablePart(
        "Router",
        "Table 7d",
        {"router-constant": "constant", "router-sparse": "sparse", DEFAULT: "soft"},
    ),
    TablePart(
        "Encoder",
        "Table 8",
        {
            DEFAULT: "CLIP, frozen",
            "encoder-trained": "CLIP, trained",
            "encoder-dino": "DINOv2-like, frozen",
        },
    ),
)


def choose_variants(names: tuple[str, ...], *, joint: bool = True) -> list[Variant]:
    """The variants of some names, in their own order; all that can be trained without names.

    Args:
        names: their names.
        joint: whether modalities are trained jointly.

    Raises:
        UsageError: there is no such variant, or it needs joint training where there is none.
    """
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UsageError(
            f"unknown variant {unknown[0]!r}",
            "the paper's ablations have names here.",
            f"use any of: {', '.join(VARIANTS)}.",
        )
    if not joint and (lost := [name for name in names if VARIANTS[name].needs_joint]):
        raise UsageError(
            f"the variant {lost[0]!r} needs joint training",
            "this size trains images alone, where it equals the default.",
            f"use --size full or short, or leave out {' and '.join(lost)}.",
        )
    chosen = [variant for variant in VARIANTS.values() if not names or variant.name in names]
    return [variant for variant in chosen if joint or not variant.needs_joint]
