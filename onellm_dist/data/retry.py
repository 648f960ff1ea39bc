"""Reading with retries, so that a transient fault (a network disk, a torn read) does no harm."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TypeVar

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.index import ShardIndex
from onellm_dist.shards.format.parts import SampleSpan, read_parts, read_span

T = TypeVar("T")
PAUSES = (0.1, 0.5, 2.0)
"""Seconds before each retry."""


def read_parts_with_retries(
    dataset: Dataset, shard: ShardInfo, row: int, extensions: Collection[str] | None = None
) -> dict[str, Part]:
    """Read the parts of a sample; retry after an error of the operating system or a bad checksum.

    Args:
        dataset: the dataset.
        shard: one of its shards.
        row: row of the sample in the shard's index.
        extensions: the parts to read; default: all.

    Raises:
        SampleError: every attempt failed (an OSError is its `__cause__`).
        OneLLMError: the shard's index is unusable.
    """
    return _retry(lambda: read_parts(dataset, shard, row, extensions))


def read_span_with_retries(
    dataset: Dataset, shard: ShardInfo, row: int, span: SampleSpan
) -> dict[str, Part]:
    """Read a sample whose position is already known; raises like `read_parts_with_retries`."""
    return _retry(lambda: read_span(dataset, shard, row, span))


def open_index_with_retries(dataset: Dataset, shard: ShardInfo) -> ShardIndex:
    """Open a shard's index; retry after an error of the operating system.

    Raises:
        OneLLMError: the index is missing, damaged or stale.
    """
    return _retry(lambda: dataset.index(shard))


def _retry(action: Callable[[], T]) -> T:
    for pause in PAUSES:
        try:
            return action()
        except OneLLMError as error:
            if not isinstance(error, SampleError) and not isinstance(error.__cause__, OSError):
                raise
            time.sleep(pause)
    return action()
