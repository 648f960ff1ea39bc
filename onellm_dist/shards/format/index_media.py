"""Add to the index of a tar which media its samples have, and how large they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.common.media_size import MediaSize, SampleMedium
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.shards.format.index import ShardIndex, get_index_path, pack_index, write_index
from onellm_dist.shards.format.media import (
    list_media,
    match_medium,
    measure_medium,
    parse_meta,
)
from onellm_dist.shards.format.tar_parts import TarParts

_MAGIC_BYTES = 16
_HEADER_BYTES = 1 << 17
"""How much of a file is read first: metadata before the size may be large."""


def index_media(tar: Path, modalities: Collection[str], *, listed: bool) -> OneLLMError | None:
    """Write the index of a tar again, with the columns of its media. The tar is only read.

    Args:
        tar: the tar, whose index fits it.
        modalities: what the samples have, or may have.
        listed: whether each sample lists its media; else each has all of `modalities`.

    Returns:
        What is wrong with a sample, which is not raised; nothing is written then.
    """
    index = ShardIndex(get_index_path(tar))
    rows = index.rows()
    rows.media = []
    for key, found in zip(
        rows.keys, read_media(tar, index, modalities, listed=listed), strict=True
    ):
        if isinstance(found, SampleError):
            return OneLLMError(f"{tar}, key {key}: {found.what}.", found.why, found.do)
        rows.media.append(found)
    end = int(index.sample_starts()[-1])
    data = pack_index(
        rows, tar_name=tar.name, tar_bytes=index.tar_bytes, tar_sha256=index.tar_sha256, end=end
    )
    write_index(tar, data)
    return None


def read_media(
    tar: Path, index: ShardIndex, modalities: Collection[str], *, listed: bool
) -> Iterator[tuple[SampleMedium, ...] | SampleError]:
    """Yield the media of each sample of a tar with their sizes, or why they cannot be listed.

    Args:
        tar: the tar.
        index: its index.
        modalities: as of `index_media`.
        listed: as of `index_media`.
    """
    with tar.open("rb") as file:
        for row in range(index.samples):
            try:
                yield _list_sample(TarParts(file, index.parts(row)), modalities, listed=listed)
            except SampleError as error:
                yield error


def _list_sample(
    parts: TarParts, modalities: Collection[str], *, listed: bool
) -> tuple[SampleMedium, ...]:
    """The media of a sample with their sizes; of large files the beginning is read alone.

    Raises:
        SampleError: they cannot be listed.
    """
    media = (
        list_media(parts, parse_meta(parts.get("json")), modalities)
        if listed
        else [SampleMedium(name) for name in all_modalities() if name in modalities]
    )
    return tuple(m._replace(size=_measure(m, parts)) for m in media)


def _measure(medium: SampleMedium, parts: TarParts) -> MediaSize:
    modality = get_modality(medium.modality)
    try:
        found = match_medium(medium.modality, medium.prefix, parts)
    except SampleError:
        return MediaSize()  # the sample is a bad one of a dataset that lists no media
    first = found[next(iter(modality.required_parts))]
    if modality.has_header(parts.cut(_MAGIC_BYTES)[first]):
        size = measure_medium(medium, parts.cut(_HEADER_BYTES))
        if size != MediaSize():
            return size
    return measure_medium(medium, parts)
