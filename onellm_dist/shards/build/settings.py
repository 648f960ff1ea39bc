"""The builder's own options, which every planned source has beside its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.workers.sandbox import SAMPLE_MB, SAMPLE_SECONDS
from onellm_dist.shards.format.valid_names import check_name
from onellm_dist.shards.format.writer import MAX_BYTES, MAX_SAMPLES
from onellm_dist.shards.sources.base import Option

DEDUP = ("none", "exact", "perceptual")

OPTIONS: Mapping[str, Option] = {
    "name": Option(
        None, "the dataset's name in sample ids; default: the name of the output folder"
    ),
    "licence": Option(None, "the licence, for the manifest; default: the usual one of the source"),
    "check": Option(
        True,
        "decode all media once; bad samples are left out and listed in quarantine.jsonl",
        bool,
    ),
    "max_failures": Option(
        0.1, "largest share of bad samples, 0 to 1; beyond it nothing is built", float
    ),
    "max_samples": Option(
        MAX_SAMPLES, "raw samples a shard, which is the most samples that it can have", int
    ),
    "max_bytes": Option(MAX_BYTES, "most bytes of content a shard", int),
    "limit": Option(None, "read only the first N raw samples", int),
    "resize": Option(
        None,
        "scale pictures down to this many pixels on the shorter side (Lanczos), and store them "
        "as JPEG; smaller pictures stay as they are",
        int,
    ),
    "quality": Option(
        None,
        "JPEG quality, 1 to 100: re-encode all pictures with it; default: 95, and only pictures "
        "that `resize` scales",
        int,
    ),
    "dedup": Option(
        "none",
        "leave out repeated media: exact (equal bytes), or perceptual (pictures with a near dHash)",
    ),
    "dedup_distance": Option(
        0, "perceptual: number of the 64 bits in which two dHashes may differ, 0 to 3", int
    ),
    "denylist": Option(
        None, "a file of URLs and SHA-256 of media, one a line; these samples are left out", Path
    ),
    "nsfw": Option(
        None,
        "keep only these values of the metadata's `nsfw`, comma-separated (UNLIKELY); samples "
        "without the value are left out",
    ),
    "max_punsafe": Option(
        None,
        "keep only samples whose metadata have a `punsafe` of at most this",
        float,
    ),
    "max_pwatermark": Option(
        None,
        "keep only samples whose metadata have a `pwatermark` of at most this",
        float,
    ),
    "min_similarity": Option(
        None,
        "keep only samples whose metadata have a `similarity` of at least this",
        float,
    ),
    "question": Option(
        None,
        "make a conversation of the caption of each sample that has none: the caption answers this "
        "question; several are separated by | and chosen by the sample's key; `default`: the "
        "paper's prompt for the modality",
        separator="|",
    ),
    "describe": Option(
        None,
        "what no file says of its media: KEY=VALUE, several separated by commas, for each sample's "
        ".json that does not say it; the keys of a modality stand in the documentation of media "
        "formats, as accel_unit=g,time_unit=ms or map_orientation=stored",
        separator=",",
    ),
    "follow": Option(
        None,
        "folders outside of IN to which paths and links in it may lead, separated by commas; "
        "`any`: anywhere; default: samples whose media lie outside are bad",
        separator=",",
    ),
    "sample_seconds": Option(
        SAMPLE_SECONDS,
        "seconds that a sample may take to decode: CPU time, or time asleep; one that takes longer "
        "twice is a bad sample; 0: any time",
        float,
    ),
    "sample_mb": Option(
        SAMPLE_MB,
        "memory in MiB that a sample may need while it is read and decoded; one that needs more "
        "is a bad sample; 0: any amount",
        int,
    ),
    "energon": Option(True, "write Megatron-Energon's metadata too (.nv-meta/, .tar.idx)", bool),
}


@dataclass(frozen=True)
class BuildSettings:
    """The values of OPTIONS, checked.

    Raises:
        UsageError: a value is out of its range.
    """

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
    question: str | None
    follow: str | None
    sample_seconds: float
    sample_mb: int
    energon: bool
    describe: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_name(self.name)
        if not 0 <= self.max_failures <= 1:
            raise UsageError(
                f"max_failures={self.max_failures} is not between 0 and 1.",
                "it is a share of the samples.",
                "0.1 allows one in ten.",
            )
        if self.max_samples < 1 or self.max_bytes < 1:
            raise UsageError(
                f"max_samples={self.max_samples}, max_bytes={self.max_bytes}: "
                "both must be at least 1.",
                "a shard holds samples.",
                "raise them.",
            )
        if self.limit is not None and self.limit < 1:
            raise UsageError(
                f"limit={self.limit} is below 1.", "nothing would be built.", "raise it."
            )
        self._check_limits()
        if self.dedup not in DEDUP:
            raise UsageError(
                f"dedup={self.dedup} is none of {', '.join(DEDUP)}.",
                "the builder would not know what to compare.",
                "choose one of them.",
            )
        if not 0 <= self.dedup_distance <= 3:
            raise UsageError(
                f"dedup_distance={self.dedup_distance} is not between 0 and 3.",
                "pictures that differ more cannot be found in one pass.",
                "lower it.",
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UsageError(
                f"quality={self.quality} is not between 1 and 100.",
                "it is the quality of JPEG.",
                "95 is a good value.",
            )
        if self.question is not None and not all(q.strip() for q in self.question.split("|")):
            raise UsageError(
                f"question={self.question!r} has an empty question.",
                "a caption would answer nothing.",
                "write one question, or several separated by |.",
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

    def _check_limits(self) -> None:
        if not (self.sample_seconds >= 0 and self.sample_mb >= 0):
            raise UsageError(
                f"sample_seconds={self.sample_seconds:g}, sample_mb={self.sample_mb}: neither may "
                "be below 0.",
                "they are what one sample may take.",
                "0 sets no limit.",
            )

    @property
    def decodes(self) -> bool:
        """Whether the builder decodes media."""
        pictures = self.resize is not None or self.quality is not None
        return self.check or pictures or self.dedup == "perceptual"

    def to_json(self) -> dict[str, Any]:
        """Return the values for the plan file; `from_json` is the inverse."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}

    def denylist_sha256(self) -> str | None:
        """Return the hex SHA-256 of the denylist's bytes; None: there is no denylist."""
        if self.denylist is None:
            return None
        return hashlib.sha256(self.denylist.read_bytes()).hexdigest()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BuildSettings:
        """Make the settings from those of a plan file."""
        denylist = values["denylist"]
        return cls(**{**values, "denylist": None if denylist is None else Path(denylist)})
