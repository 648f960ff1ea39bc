"""Examples to try a chat with: samples of the toy world, which every machine can make."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.shards.sources.toyworld.render import render_sample
from onellm_dist.shards.sources.toyworld.world import get_scenes

_SPLIT = "test_seen"


class ChatExample(NamedTuple):
    """A medium, and what to ask about it."""

    files: dict[str, Path]
    """The modality's part -> its file."""
    question: str


def list_examples(modalities: Iterable[str]) -> list[str]:
    """The modalities of which there is an example."""
    return [name for name in modalities if _has_scenes(name)]


def _has_scenes(modality: str) -> bool:
    try:
        get_scenes(modality)
    except UsageError:
        return False
    return True


def make_example(modality: str, folder: Path) -> ChatExample:
    """Write the files of an example.

    Args:
        modality: one of `list_examples`.
        folder: where they are written.

    Raises:
        OSError: they cannot be written.
    """
    sample = render_sample(modality, _SPLIT, 0)
    files = {}
    for role, extension in get_modality(modality).match(sample.parts).items():
        files[role] = folder / f"{sample.key}.{extension}"
        files[role].write_bytes(sample.parts[extension])
    turns = json.loads(sample.parts["json"])["conversations"]
    return ChatExample(files, turns[0]["value"])
