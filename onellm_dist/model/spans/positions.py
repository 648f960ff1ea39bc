"""Which span of its medium a span is: a row for each number, added to the tokens of the span.

A tile looks like any picture, and a window of a sound like any sound. `span_positions` of the
model's config says whether the LLM knows which is which: `fixed` adds sines and cosines of the
span's number (Vaswani et al. 2017, section 3.5), `learned` a trained row. The row of number 0 is
zero, so that a medium of one span is what it is without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.media_size import MOST_SPANS
from onellm_dist.model.sequence_lengths import to_device_tensor

if TYPE_CHECKING:
    from onellm_dist.model.configuration import OneLLMConfig
    from onellm_dist.model.projector import Projector

SpanNumbers = Mapping[str, Sequence[int]]
"""Modality to the number of each of its spans within its medium: 0, 1, ..."""
SPAN_ROWS = ".span_positions.weight"
"""Ending of the names of learned rows."""
_BASE = 10000.0


def add_span_positions(
    kind: str, projector: Projector, tokens: torch.Tensor, numbers: Sequence[int] | None
) -> torch.Tensor:
    """Add the row of its number to each token of a span: [n, Q, d] -> [n, Q, d].

    Args:
        kind: `none`, `fixed` or `learned`.
        projector: the modality's, which has the learned rows.
        tokens: tokens of n spans.
        numbers: number of each span within its medium; None: 0 for all.

    Raises:
        OneLLMError: there are not n numbers, or one is out of range.
    """
    numbers = [0] * len(tokens) if numbers is None else list(numbers)
    if len(numbers) != len(tokens) or any(not 0 <= number < MOST_SPANS for number in numbers):
        raise OneLLMError(
            f"{len(tokens)} spans have the numbers {numbers!r:.120} in their media",
            f"each span has one of 0 to {MOST_SPANS - 1}.",
            "fix the code that made this batch (see onellm_dist/packed.py).",
        )
    if kind == "none" or (kind == "fixed" and not any(numbers)):
        return tokens
    if kind == "fixed":
        host = build_fixed_rows(max(numbers) + 1, tokens.shape[-1])
        rows = to_device_tensor(host, tokens.device, torch.float32)
    else:  # also for n = 0: the collectives of a sharded model match on all ranks
        learned = projector.span_positions()
        rows = torch.cat([learned.new_zeros(1, learned.shape[-1]), learned])
    at = to_device_tensor(numbers, rows.device)
    return tokens + rows.index_select(0, at)[:, None].to(tokens)


def build_fixed_rows(count: int, width: int) -> torch.Tensor:
    """[count, width] fp32 sines and cosines of 0 .. count - 1, less those of 0."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(_BASE) / width))
    angles = torch.arange(count)[:, None] * rates
    rows = torch.stack([angles.sin(), angles.cos() - 1], dim=-1).flatten(1)
    return rows[:, :width]


def set_span_positions(config: OneLLMConfig, kind: str | None) -> None:
    """Give a model without span positions those that a recipe asks for.

    Args:
        config: the model's; it is changed.
        kind: `model.span_positions`; None: as the model has them.

    Raises:
        UsageError: the model has others.
    """
    if kind is None or kind == config.span_positions:
        return
    if config.span_positions != "none":
        raise UsageError(
            f"model.span_positions={kind}, but the model has {config.span_positions} ones",
            "its weights were trained with them.",
            "leave model.span_positions out.",
        )
    config.span_positions = kind


def read_span_positions(folder: Path | None) -> str | None:
    """The span positions that the model of a run has without `model.span_positions`.

    Args:
        folder: `model.path`; None: a preset, which has none.

    Returns:
        `none`, `fixed` or `learned`; None if the folder's config cannot be read.
    """
    if folder is None:
        return "none"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("span_positions") or "none")  # saved before there were any
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def list_span_numbers(
    spans: Sequence[Sequence[str]], numbers: Sequence[Sequence[int]]
) -> SpanNumbers | None:
    """The numbers of the spans of a batch, by modality.

    Args:
        spans: the modality of each span of each sample.
        numbers: the number of each span in its medium, in the same form; (): all are 0.

    Raises:
        OneLLMError: a sample has more or fewer numbers than spans.
    """
    if not numbers:
        return None
    if [len(own) for own in spans] != [len(own) for own in numbers]:
        raise OneLLMError(
            f"the pack has the span numbers {list(map(tuple, numbers))!r:.120} for spans "
            f"{list(map(tuple, spans))!r:.120}",
            "each span has a number within its medium.",
            "fix the code that made this pack (see onellm_dist/packed.py).",
        )
    found: dict[str, list[int]] = {}
    for own, theirs in zip(spans, numbers, strict=True):
        for name, number in zip(own, theirs, strict=True):
            found.setdefault(name, []).append(number)
    return found
