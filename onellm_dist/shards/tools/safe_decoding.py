"""Decoding the media of a dataset's samples where a broken file can do no harm."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TypeVar

from onellm_dist.common.workers.samples import SampleFunction, SampleLimits, SamplePool
from onellm_dist.common.workers.words import PoolWords
from onellm_dist.shards.format.dataset import Dataset, ShardInfo

Outcome = TypeVar("Outcome")
Row = tuple[ShardInfo, int]
"""A sample: its shard, and its row in it."""

_WORDS = PoolWords(
    worker="worker",
    result="sample",
    parent="command",
    seconds="the limit of a sample",
    megabytes="the limit of a sample",
    fewer="close other programs",
)


def map_rows(
    dataset: Dataset,
    rows: Sequence[Row],
    apply: Callable[[Dataset, ShardInfo, int], Outcome],
    refuse: Callable[[Dataset, ShardInfo, int, str], Outcome],
) -> Generator[Outcome]:
    """Apply a function that decodes media to some samples in order, in a worker process.

    Samples are read as they are asked for. Close the generator if you leave it early: that ends
    the worker.

    Args:
        dataset: an open dataset.
        rows: some of its samples.
        apply: the function.
        refuse: called instead, with the reason, for a sample that hangs, crashes its worker or
            needs too much memory.

    Raises:
        OneLLMError: what the function raised.
    """

    def get_name(number: int) -> str:
        shard, row = rows[number]
        return f"{dataset.name}/{shard.name}/{dataset.index(shard).key(row)}"

    function = SampleFunction[int, Outcome](
        lambda number: apply(dataset, *rows[number]),
        lambda number, reason: refuse(dataset, *rows[number], reason),
        get_name,
    )
    with closing(SamplePool(function, _WORDS, SampleLimits())) as pool:
        yield from pool.map(range(len(rows)))
