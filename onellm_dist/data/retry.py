"""Reading a sample's parts so that a passing fault (a network disk, a torn read) is none."""

from __future__ import annotations

import time
from collections.abc import Collection

from onellm_dist.errors import SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.shards.format import Dataset, ShardInfo
from onellm_dist.shards.index import read_parts

PAUSES = (0.1, 0.5, 2.0)
"""Seconds before each further try."""


def read_with_retries(dataset: Dataset, shard: ShardInfo, row: int, extensions: Collection[str] | None = None) -> dict[str, Part]:
    """`read_parts`, tried again after a failure of the operating system or of a checksum.

    Raises:
        SampleError: it failed every time (with the OSError as its `__cause__`, where it was one).
    """
    for pause in PAUSES:
        try:
            return read_parts(dataset, shard, row, extensions)
        except SampleError:
            time.sleep(pause)
    return read_parts(dataset, shard, row, extensions)
