"""What the samples of tars from elsewhere have: the same media each, or media that they list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.shards.format.index import ShardIndex, get_index_path
from onellm_dist.shards.format.media import split_prefix
from onellm_dist.shards.format.names import find_readable_modalities, infer_modalities


def find_media(
    root: Path, tars: Iterable[Path], modalities: Sequence[str] | None
) -> tuple[tuple[str, ...], bool]:
    """Find out by the names of their parts what samples of indexed tars have.

    Args:
        root: their folder, for messages.
        tars: the tars.
        modalities: the user's; None to infer them.

    Returns:
        Modalities, and whether each sample lists its own media: parts have numbers (`0.jpg`), or
        samples differ. Else each sample has all of them, once.

    Raises:
        UsageError: the names do not determine the modalities.
    """
    sets: Counter[frozenset[str]] = Counter()
    for tar in tars:
        for extensions, (count, _) in ShardIndex(get_index_path(tar)).extension_sets().items():
            sets[extensions - set(TEXT_EXTENSIONS)] += count
    numbered = any(split_prefix(e)[0] for extensions in sets for e in extensions)
    if modalities is None and not numbered and len(_group(sets)) == 1:
        modalities = infer_modalities(sets, root)
    if modalities is not None:
        plain = not numbered and all(_has_all(extensions, modalities) for extensions in sets)
        return tuple(modalities), not plain
    found: set[str] = set()
    for extensions in sets:
        prefixes: dict[str, set[str]] = {}
        for prefix, own in map(split_prefix, extensions):
            prefixes.setdefault(prefix, set()).add(own)
        for own_parts in prefixes.values():
            readable = find_readable_modalities(own_parts)
            _require_one_reader(root, own_parts, readable)
            found.update(readable)
    return tuple(name for name in all_modalities() if name in found), True


def _group(sets: Iterable[frozenset[str]]) -> set[tuple[str, ...]]:
    return {find_readable_modalities(extensions) for extensions in sets}


def _has_all(extensions: frozenset[str], modalities: Sequence[str]) -> bool:
    try:
        for name in modalities:
            get_modality(name).match(set(extensions))
    except SampleError:
        return False
    return True


def _require_one_reader(root: Path, own: Iterable[str], readable: Sequence[str]) -> None:
    """Refuse parts that several modalities could read, such as `.npy`.

    Raises:
        UsageError: there is such a part.
    """
    for extension in sorted(own):
        readers = [
            name
            for name in readable
            if any(extension in e for e in get_modality(name).required_parts.values())
        ]
        if len(readers) > 1:
            raise UsageError(
                f"{root}: .{extension} there may be {' or '.join(readers)}.",
                "samples would get media that they do not have.",
                "name the modalities that samples may have: --modality NAME, repeated for several.",
            )
