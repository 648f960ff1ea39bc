"""The model card of a onellm directory that a conversion writes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from onellm_dist.common.counts import format_count
from onellm_dist.convert.checkpoint import OpenedCheckpoint
from onellm_dist.model.card import CARD, build_card


def count_parameters_by_part(opened: OpenedCheckpoint) -> dict[str, int]:
    """Parameters of each part of a model; the first component of a name is its part."""
    counts: Counter[str] = Counter()
    for name, tensor in opened.tensors.items():
        part = name.split(".", 1)[0] if opened.kind == "onellm" else opened.kind
        counts[part] += tensor.numel
    return dict(counts)


def write_card(folder: Path, opened: OpenedCheckpoint) -> None:
    """Write README.md into a folder.

    Args:
        folder: the folder.
        opened: the OneLLM that was written there.
    """
    notes = dict(opened.notes)
    if opened.initialised:
        notes["random parts"] = (
            f"{format_count(len(opened.initialised), 'tensor')} initialised and not trained yet"
        )
    card = build_card(
        opened.config,
        count_parameters_by_part(opened),
        opened.dtype,
        f"from a checkpoint of the format `{opened.format}`",
        notes,
    )
    (folder / CARD).write_text(card, encoding="utf-8")
