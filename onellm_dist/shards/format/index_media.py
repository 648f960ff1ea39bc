"""Add to the index of a tar which media its samples have, and how large they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.common.media_size import SampleMedium
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.format.index import ShardIndex, get_index_path, pack_index, write_index
from onellm_dist.shards.format.media import measure_media, measure_medium, split_prefix
from onellm_dist.shards.format.names import find_readable_modalities


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
    plain = [SampleMedium(name) for name in all_modalities() if name in modalities]
    with tar.open("rb") as file:
        for row in range(index.samples):
            content = {}
            for extension, location in index.parts(row).items():
                file.seek(location.offset)
                content[extension] = file.read(location.size)
            try:
                yield (
                    measure_media(content, modalities)
                    if listed
                    else tuple(m._replace(size=measure_medium(m, content)) for m in plain)
                )
            except SampleError as error:
                yield error


def find_media_modalities(tars: Iterable[Path]) -> tuple[str, ...]:
    """Find the modalities that samples of indexed tars may have, by the names of their parts."""
    found: Counter[str] = Counter()
    for tar in tars:
        for extensions in ShardIndex(get_index_path(tar)).extension_sets():
            prefixes: dict[str, set[str]] = {}
            for prefix, own in map(split_prefix, extensions):
                prefixes.setdefault(prefix, set()).add(own)
            for own_parts in prefixes.values():
                found.update(find_readable_modalities(own_parts))
    return tuple(name for name in all_modalities() if name in found)
