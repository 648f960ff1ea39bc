"""Read the parts of single samples by byte range, each checked against the CRC-32 of the index."""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from onellm_dist.common.errors import SampleError
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.index import PartLocation

if TYPE_CHECKING:
    from onellm_dist.modalities.base import Part


class SampleSpan(NamedTuple):
    """The byte range of a tar that holds some parts of one sample."""

    parts: dict[str, PartLocation]
    start: int
    end: int


def get_sample_span(
    dataset: Dataset, shard: ShardInfo, row: int, extensions: Collection[str] | None = None
) -> SampleSpan:
    """Return where the parts of a sample lie.

    Args:
        dataset: an open dataset.
        shard: one of its shards.
        row: the sample's row in the shard's index.
        extensions: only these parts; None: all. Without any such part the span is empty.
    """
    return get_parts_span(dataset.index(shard).parts(row), extensions)


def get_parts_span(
    locations: Mapping[str, PartLocation], extensions: Collection[str] | None = None
) -> SampleSpan:
    """Return the same as `get_sample_span`, from the locations that `ShardIndex.parts` gives."""
    parts = {e: p for e, p in locations.items() if extensions is None or e in extensions}
    start = min((part.offset for part in parts.values()), default=0)
    end = max((part.offset + part.size for part in parts.values()), default=0)
    return SampleSpan(parts, start, end)


def read_parts(
    dataset: Dataset, shard: ShardInfo, row: int, extensions: Collection[str] | None = None
) -> dict[str, Part]:
    """Read the parts of one sample with one byte-range read.

    Args:
        dataset: an open dataset.
        shard: one of its shards.
        row: the sample's row in the shard's index.
        extensions: only these parts, as far as the sample has them; None: all.

    Raises:
        SampleError: the tar cannot be read there, or its bytes differ from what the index says. The
            message names dataset, shard, key, part and offset. If the operating system failed, its
            OSError is the `__cause__`, and a retry may help.
    """
    return read_span(dataset, shard, row, get_sample_span(dataset, shard, row, extensions))


def read_span(dataset: Dataset, shard: ShardInfo, row: int, span: SampleSpan) -> dict[str, Part]:
    """Read the parts of a sample whose span is known.

    Raises:
        SampleError: as `read_parts`.
    """
    if not span.parts:
        return {}
    try:
        data = dataset.read_tar(shard, span.start, span.end)
    except OSError as error:
        key = dataset.index(shard).key(row)
        raise SampleError(
            f"dataset {dataset.name}, shard {shard.path}, key {key}, offset {span.start}: "
            f"{error.strerror or error}.",
            "the sample cannot be read.",
            "check that the file exists and is readable; a short fault of a network disk passes "
            "by itself.",
        ) from error
    return extract_parts(dataset, shard, row, span, data)


def extract_parts(
    dataset: Dataset, shard: ShardInfo, row: int, span: SampleSpan, data: bytes
) -> dict[str, Part]:
    """Cut the parts of a sample out of the bytes of its span, and check each.

    Raises:
        SampleError: bytes are missing, or differ from what the index says.
    """
    from onellm_dist.modalities.base import Part  # here: reading an index needs no torch

    found = {}
    for extension, (offset, size, crc32) in span.parts.items():
        part = data[offset - span.start : offset - span.start + size]
        if len(part) != size or zlib.crc32(part) != crc32:
            how = (
                f"only {len(part)} of its {size} bytes are there"
                if len(part) != size
                else "its bytes fail their CRC-32"
            )
            key = dataset.index(shard).key(row)
            raise SampleError(
                f"dataset {dataset.name}, shard {shard.path}, key {key}, "
                f"part .{extension} at offset {offset}: {how}.",
                "the tar was damaged or changed after it was indexed.",
                f"find every damaged part: onellm shards verify {shlex.quote(dataset.location)}",
            )
        found[extension] = Part(extension, part)
    return found
