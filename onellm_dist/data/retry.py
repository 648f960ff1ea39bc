"""Reading so that a passing fault (a network disk, a torn read) is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TypeVar

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.index import SampleSpan, ShardIndex, read_parts, read_span

T = TypeVar("T")
PAUSES = (0.1, 0.5, 2.0)
"""Seconds before each further try."""


def read_with_retries(
    dataset: Dataset, shard: ShardInfo, row: int, extensions: Collection[str] | None = None
) -> dict[str, Part]:
    """`read_parts`, tried again after a failure of the operating system or of a checksum.

    Raises:
        SampleError: it failed every time (with the OSError as its `__cause__`, where it was one).
        OneLLMError: the shard's index cannot be used.
    """
    return _retried(lambda: read_parts(dataset, shard, row, extensions))


def span_with_retries(
    dataset: Dataset, shard: ShardInfo, row: int, span: SampleSpan
) -> dict[str, Part]:
    """`read_with_retries` of a sample whose place is known already; raises the same."""
    return _retried(lambda: read_span(dataset, shard, row, span))


def index_with_retries(dataset: Dataset, shard: ShardInfo) -> ShardIndex:
    """`Dataset.index`, tried again after a failure of the operating system.

    Raises:
        OneLLMError: the index is missing, damaged or stale.
    """
    return _retried(lambda: dataset.index(shard))


def _retried(action: Callable[[], T]) -> T:
    for pause in PAUSES:
        try:
            return action()
        except OneLLMError as error:
            if not isinstance(error, SampleError) and not isinstance(error.__cause__, OSError):
                raise
            time.sleep(pause)
    return action()
