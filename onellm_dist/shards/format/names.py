"""What the names of files and parts say: extension, key, modality.

Sources, and the indexing of tars from elsewhere, share these rules.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.modalities import Modality, all_modalities, get_modality
from onellm_dist.shards.storage.paths import StoragePath

TEXT_ONLY = "text"
"""`modality=text`: samples of text alone."""
_COMPRESSED_TAR = re.compile(
    r"\.(?:tar\.(?:gz|z|bz2?|xz|lzma|lz4?|lzo|zstd?|sz|br)|t(?:gz|az|bz2?|b2|xz|lz|lzma|zst))$",
    re.IGNORECASE,
)


def is_compressed_tar(name: str) -> bool:
    """Check by its name whether a file is a compressed tar, whose samples have no byte ranges."""
    return _COMPRESSED_TAR.search(name) is not None


@cache
def get_known_extensions() -> frozenset[str]:
    """Return every extension that some modality reads, and those of the text parts."""
    media = {
        extension
        for modality in all_modalities().values()
        for accepted in get_modality_parts(modality).values()
        for extension in accepted
    }
    return frozenset(media | set(TEXT_EXTENSIONS))


def split_file_name(name: str) -> tuple[str, str] | None:
    """Split a file name into (stem, lower-cased extension).

    Returns:
        None if no modality knows the extension.
    """
    pieces = name.split(".")
    for first in range(1, len(pieces)):
        extension = ".".join(pieces[first:]).lower()
        stem = ".".join(pieces[:first])
        if extension in get_known_extensions() and stem:
            return stem, extension
    return None


def make_safe_key(path: str) -> str:
    """Make a WebDataset key of a path without extension: dots of the last component become `_`."""
    folder, slash, stem = path.replace(os.sep, "/").lstrip("/").rpartition("/")
    return folder + slash + stem.replace(".", "_")


def get_modality_parts(modality: Modality) -> dict[str, tuple[str, ...]]:
    """Return the names of all parts, optional ones too, with the extensions that each accepts."""
    return {**modality.required_parts, **modality.optional_parts}


def find_readable_modalities(extensions: Iterable[str]) -> tuple[str, ...]:
    """Return the modalities that a sample with these extensions can be.

    A modality that uses only some of the extensions that another one uses is left out.
    """
    available = set(extensions)
    used: dict[str, set[str]] = {}
    for name, modality in all_modalities().items():
        if all(available & set(accepted) for accepted in modality.required_parts.values()):
            accepted_all = {e for a in get_modality_parts(modality).values() for e in a}
            used[name] = accepted_all & available
    return tuple(n for n, own in used.items() if not any(own < other for other in used.values()))


def parse_modalities(text: str) -> tuple[str, ...]:
    """Parse `image`, `image,audio`, or `text` (no modality).

    Raises:
        UsageError: a name is unknown, or given twice.
    """
    if text.strip() == TEXT_ONLY:
        return ()
    names = tuple(n.strip() for n in text.split(","))
    for name in names:
        get_modality(name)
    if len(set(names)) != len(names):
        raise UsageError(
            f"modality={text} names a modality twice.",
            "a sample has one span a modality.",
            "name each once.",
        )
    return names


def infer_modalities(
    extension_sets: Mapping[frozenset[str], int], where: StoragePath
) -> tuple[str, ...]:
    """Infer the one modality of a set of samples.

    Args:
        extension_sets: the sets of media extensions that samples have, and how many have each.
        where: their folder, for messages.

    Raises:
        UsageError: no modality is possible, or several are.
    """
    votes: Counter[tuple[str, ...]] = Counter()
    for extensions, count in extension_sets.items():
        votes[find_readable_modalities(extensions)] += count
    del votes[()]
    if not votes:
        seen = ", ".join(sorted({f".{e}" for extensions in extension_sets for e in extensions}))
        known = get_known_extensions()
        dotted = sorted(
            e
            for extensions in extension_sets
            for e in extensions
            if e not in known and e.rpartition(".")[2] in known
        )
        raise UsageError(
            f"{where}: no file there is media of a known modality"
            f"{f' (only {seen})' if seen else ''}.",
            "there is nothing to build from.",
            f"in a tar, the extension begins at the first dot of a name, so .{dotted[0]} is one: "
            "write the tars again with other dots as _ (22_05.jpg)."
            if dotted
            else f"known extensions: {', '.join(sorted(known))}.",
        )
    if len(votes) > 1 or len(next(iter(votes))) > 1:
        found = "; ".join(f"{count} of {' or '.join(n)}" for n, count in votes.most_common())
        raise UsageError(
            f"{where}: the extensions do not determine the modality: {found}.",
            "a dataset has one modality, or one combination that every sample has.",
            "name it: modality=NAME, or modality=NAME,NAME for samples that have several.",
        )
    return next(iter(votes))


def make_dataset_name(path: StoragePath) -> str:
    """Make a dataset's name of a folder's name.

    Characters other than letters, digits and `._-` become `_`, and leading `.` and `-` are dropped.
    """
    name = Path(os.path.abspath(path)).name if isinstance(path, Path) else path.name
    return re.sub(r"[^\w.-]", "_", name).lstrip(".-") or "dataset"
