"""The text parts of all samples of a shard, in order; of a remote shard, many at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from onellm_dist.common.errors import SampleError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.data.read_ahead import ByteRange, ReadAhead
from onellm_dist.data.retry import open_index_with_retries, read_parts_with_retries
from onellm_dist.modalities.base import Part
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.parts import SampleSpan, extract_parts, get_sample_span

WINDOW_BYTES = 64 << 20
"""Part of a remote shard whose texts are fetched together."""


class _Row(NamedTuple):
    """A sample of a remote shard, and where its text parts lie."""

    row: int
    parts: SampleSpan
    bytes: ByteRange


def open_texts(dataset: Dataset, shard: ShardInfo) -> Iterator[Callable[[], dict[str, Part]]]:
    """Yield for each row a function that reads its text parts.

    Of a remote shard, windows of rows are fetched together, one window ahead.
    """
    if dataset.remote is None:
        yield from (
            partial(read_parts_with_retries, dataset, shard, row, TEXT_EXTENSIONS)
            for row in range(shard.samples)
        )
        return
    ahead = ReadAhead(None, 2 * WINDOW_BYTES)
    windows = list(_build_windows(dataset, shard))
    after: list[list[_Row]] = [*windows[1:], []]
    for now, following in zip(windows, after, strict=bool(windows)):
        ahead.request([row.bytes for row in now], [row.bytes for row in following])
        for row in now:
            yield partial(_read_fetched, ahead, row)


def _build_windows(dataset: Dataset, shard: ShardInfo) -> Iterator[list[_Row]]:
    """Yield neighbouring rows of a shard, as many as fill WINDOW_BYTES of the tar."""
    open_index_with_retries(dataset, shard)
    window: list[_Row] = []
    for row in range(shard.samples):
        parts = get_sample_span(dataset, shard, row, TEXT_EXTENSIONS)
        if window and parts.end - window[0].parts.start > WINDOW_BYTES:
            yield window
            window = []
        window.append(_Row(row, parts, ByteRange(dataset, shard, parts.start, parts.end)))
    yield window


def _read_fetched(ahead: ReadAhead, row: _Row) -> dict[str, Part]:
    """Read the text parts of a row: from what was fetched, else from the shard."""
    dataset, shard = row.bytes.dataset, row.bytes.shard
    data = ahead.load(row.bytes)
    if data is not None:
        with contextlib.suppress(SampleError):
            return extract_parts(dataset, shard, row.row, row.parts, data)
    return read_parts_with_retries(dataset, shard, row.row, TEXT_EXTENSIONS)
