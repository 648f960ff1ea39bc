"""Media as lmms-eval gives them: paths, PIL pictures, arrays."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import SampleError
from onellm_dist.evaluation.benchmark_data import read_spans
from onellm_dist.modalities import Part, get_modality
from onellm_dist.model.generation.media_cache import Medium
from onellm_dist.model.processing.media import read_medium_spans


def read_media_of_prompt(given: Sequence[tuple[str, Any]], most: Mapping[str, int]) -> list[Medium]:
    """Read the media of a prompt; those of a modality share its spans, as in training.

    Args:
        given: modality and medium of each.
        most: modality -> the most spans, as the model was trained; default: one.

    Returns:
        The spans in the order in which training lays out the modalities.

    Raises:
        SampleError: one cannot be read.
        UsageError: one is not a medium of its modality.
    """
    counts = Counter(name for name, _ in given)
    ordered = sorted(given, key=lambda pair: get_modality(pair[0]).order)
    return [
        span
        for name, medium in ordered
        for span in read_medium(name, medium, max(1, most.get(name, 1) // counts[name]))
    ]


def read_medium(name: str, given: Any, most: int = 1) -> Iterator[Medium]:
    """Read a medium as lmms-eval gives it: a path, a PIL picture, or an array with its rate.

    Args:
        name: name of the modality, which is lmms-eval's word for the content too.
        given: the medium.
        most: the most spans that it may take.

    Raises:
        SampleError: it cannot be read.
        UsageError: it is not a medium of the modality.
    """
    modality = get_modality(name)
    values: Sequence[torch.Tensor] | torch.Tensor
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        try:
            part = Part(path.suffix.removeprefix(".").lower(), path.read_bytes())
        except OSError as error:
            raise SampleError(f"{path}: {error.strerror}") from None
        matched = dict.fromkeys(modality.match({part.extension}), part)
        values = read_spans(modality, matched, {}, most)
    else:
        picture = given.convert("RGB") if hasattr(given, "convert") else given
        values = read_medium_spans(name, picture, most)
    for number, value in enumerate(values):
        yield Medium(name, value, f"{name} {_digest(value)}", number)


def _digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
