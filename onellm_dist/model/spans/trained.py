"""`data.spans` of a model's training, as its config keeps it: media are read as in training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.media_size import MOST_SPANS


def get_spans(config: Any) -> dict[str, int]:
    """The most spans of each modality in a sample; {}: one span a medium.

    Args:
        config: the model's.

    Raises:
        UsageError: the config has something else there.
    """
    return check_spans(getattr(config, "spans", None), "config.json: spans")


def set_spans(config: Any, spans: Mapping[str, int]) -> None:
    """Let a model read media as it was trained.

    Args:
        config: the model's; it is changed.
        spans: `data.spans` of the training.
    """
    if spans or getattr(config, "spans", None):
        config.spans = dict(spans)


def read_saved_spans(folder: Path) -> dict[str, int] | None:
    """Read what the config of a saved model or adapter says.

    Args:
        folder: its folder.

    Returns:
        As of `get_spans`; None where there is no config that can be read.

    Raises:
        UsageError: the config has something else there.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return check_spans(found.get("spans"), f"{path}: spans") if isinstance(found, dict) else None


def check_spans(value: object, where: str) -> dict[str, int]:
    """Check what a file gives as `data.spans`.

    Args:
        value: what stands there; None: nothing.
        where: the file and the key.

    Raises:
        UsageError: it does not give numbers of spans by modality.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str) and type(most) is int and 0 < most <= MOST_SPANS
        for name, most in value.items()
    ):
        raise UsageError(
            f"{where}: {str(value)[:200]}",
            f"a modality has a number from 1 to {MOST_SPANS}, by which its media are read.",
            "restore the file.",
        )
    return dict(value)


def describe_spans(spans: Mapping[str, int]) -> str:
    """Spans in words: `image 5, audio 6`; `one a medium` if there are none."""
    return ", ".join(f"{name} {most}" for name, most in spans.items()) or "one a medium"
