"""Samples that are left out knowingly: by a denylist, or by thresholds on their metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from onellm_dist.shards.build.settings import BuildSettings

_SHA256 = re.compile(r"[0-9a-f]{64}")


@lru_cache(maxsize=1)
def read_denylist(path: Path) -> frozenset[str]:
    """Read a denylist: a URL or a hex SHA-256 a line, and empty lines and comments (`#`)."""
    with path.open(encoding="utf-8") as file:
        lines = (line.strip() for line in file)
        return frozenset(
            entry.lower() if _SHA256.fullmatch(entry.lower()) else entry
            for entry in lines
            if entry and entry[0] != "#"
        )


def filter_by_meta(meta: Mapping[str, Any], settings: BuildSettings) -> str | None:
    """Return why a sample with this metadata is left out; None: it is kept."""
    values = {k.lower(): v for k, v in meta.items()}
    if settings.denylist is not None:
        listed = read_denylist(settings.denylist)
        if values.get("url") in listed or str(values.get("sha256", "")).lower() in listed:
            return "denylist"
    if settings.nsfw is not None and str(values.get("nsfw")).upper() not in {
        v.strip().upper() for v in settings.nsfw.split(",")
    }:
        return f"nsfw: {values.get('nsfw')}"
    for name, limit in (("punsafe", settings.max_punsafe), ("pwatermark", settings.max_pwatermark)):
        value = _to_number(values.get(name))
        if limit is not None and (value is None or not value <= limit):
            return f"{name}: not known" if value is None else f"{name}: above {limit:g}"
    if settings.min_similarity is not None:
        value = _to_number(values.get("similarity"))
        if value is None:
            return "similarity: not known"
        if not value >= settings.min_similarity:
            return f"similarity: below {settings.min_similarity:g}"
    return None


def filter_by_hash(digests: Iterable[str], settings: BuildSettings) -> str | None:
    """Return why a sample with media of these SHA-256 (hex) is left out; None: it is kept."""
    if settings.denylist is not None and not read_denylist(settings.denylist).isdisjoint(digests):
        return "denylist"
    return None


def _to_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
