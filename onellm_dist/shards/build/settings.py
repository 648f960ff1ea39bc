"""What the builder does with any source's samples: the options that every planned source has beside its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.writer import MAX_BYTES, MAX_SAMPLES, check_name
from onellm_dist.shards.sources.base import Option

DEDUP = ("none", "exact", "perceptual")

OPTIONS: Mapping[str, Option] = {
    "name": Option(None, "the dataset's name in sample ids; the output folder's name if not given"),
    "licence": Option(None, "goes to the manifest; the source's usual one if not given"),
    "check": Option(
        True, "decode every media once; bad ones are left out and listed in quarantine.jsonl", bool
    ),
    "max_failures": Option(
        0.1, "largest share of bad samples, 0 to 1; beyond it nothing is built", float
    ),
    "max_samples": Option(MAX_SAMPLES, "raw_samples a shard: most samples it can have", int),
    "max_bytes": Option(MAX_BYTES, "most bytes of content a shard", int),
    "limit": Option(None, "only the first so many raw_samples", int),
    "resize": Option(
        None,
        "pictures whose shorter side is longer than this many pixels are made this small (Lanczos) and stored as JPEG",
        int,
    ),
    "quality": Option(
        None,
        "JPEG quality, 1 to 100: pictures are encoded again with it (default 95 where `resize` does so)",
        int,
    ),
    "dedup": Option(
        "none",
        "leave out repeated media: exact (equal bytes), or perceptual (pictures whose dHash is near)",
    ),
    "dedup_distance": Option(
        0, "perceptual: bits of 64 in which two dHashes may differ, 0 to 3", int
    ),
    "denylist": Option(
        None, "a file of URLs and SHA-256 of media, one a line, that are left out", Path
    ),
    "nsfw": Option(
        None,
        "the values of meta's `nsfw` that are kept, by comma (UNLIKELY); samples without the value are left out",
    ),
    "max_punsafe": Option(
        None,
        "largest `punsafe` of meta that is kept; samples without the value are left out",
        float,
    ),
    "max_pwatermark": Option(
        None,
        "largest `pwatermark` of meta that is kept; samples without the value are left out",
        float,
    ),
    "min_similarity": Option(
        None,
        "least `similarity` of meta that is kept; samples without the value are left out",
        float,
    ),
    "energon": Option(True, "write Megatron-Energon's metadata too (.nv-meta/, .tar.idx)", bool),
}


@dataclass(frozen=True)
class BuildSettings:
    """The values of OPTIONS; checked."""

    name: str
    licence: str
    check: bool
    max_failures: float
    max_samples: int
    max_bytes: int
    limit: int | None
    resize: int | None
    quality: int | None
    dedup: str
    dedup_distance: int
    denylist: Path | None
    nsfw: str | None
    max_punsafe: float | None
    max_pwatermark: float | None
    min_similarity: float | None
    energon: bool

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 0 <= self.max_failures <= 1:
            raise UsageError(
                f"max_failures={self.max_failures} is not within 0 and 1.",
                "it is a share of the samples.",
                "0.1 allows one in ten.",
            )
        if self.max_samples < 1 or self.max_bytes < 1:
            raise UsageError(
                f"max_samples={self.max_samples}, max_bytes={self.max_bytes}: both must be at least 1.",
                "a shard holds samples.",
                "raise them.",
            )
        if self.limit is not None and self.limit < 1:
            raise UsageError(
                f"limit={self.limit} is below 1.", "nothing would be built.", "raise it."
            )
        if self.dedup not in DEDUP:
            raise UsageError(
                f"dedup={self.dedup} is none of {', '.join(DEDUP)}.",
                "it is not known what to compare.",
                "choose one.",
            )
        if not 0 <= self.dedup_distance <= 3:
            raise UsageError(
                f"dedup_distance={self.dedup_distance} is not within 0 and 3.",
                "farther neighbours cannot be found in one pass.",
                "lower it.",
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UsageError(
                f"quality={self.quality} is not within 1 and 100.",
                "it is JPEG's.",
                "95 is a good one.",
            )
        if self.resize is not None and self.resize < 1:
            raise UsageError(
                f"resize={self.resize} is below 1.", "it is a number of pixels.", "raise it."
            )
        if self.denylist is not None and not self.denylist.is_file():
            raise UsageError(
                f"{self.denylist}: there is no such denylist.",
                "nothing would be left out.",
                "check the option denylist.",
            )

    def to_json(self) -> dict[str, Any]:
        """For the plan file; `from_json` is its inverse."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}

    def denylist_sha256(self) -> str | None:
        """Hex SHA-256 of the denylist's bytes; None: there is none."""
        return (
            None
            if self.denylist is None
            else hashlib.sha256(self.denylist.read_bytes()).hexdigest()
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BuildSettings:
        """The settings of a plan file."""
        denylist = values["denylist"]
        return cls(**{**values, "denylist": None if denylist is None else Path(denylist)})
