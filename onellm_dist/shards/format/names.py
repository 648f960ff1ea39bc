"""What file and part names say: extension, key, modality. Sources and the indexing of foreign tars share these rules."""

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
from onellm_dist.shards.storage.paths import RemotePath

TEXT_ONLY = "text"
"""`modality=text`: samples of text alone."""


@cache
def known_extensions() -> frozenset[str]:
    """Every extension that some modality reads, and the text parts'."""
    media = {
        e
        for m in all_modalities().values()
        for accepted in (*m.required_parts.values(), *m.optional_parts.values())
        for e in accepted
    }
    return frozenset(media | set(TEXT_EXTENSIONS))


def split_file_name(name: str) -> tuple[str, str] | None:
    """(stem, lower-cased extension) of a file name; None where no modality knows its extension."""
    pieces = name.split(".")
    for first in range(1, len(pieces)):
        extension = ".".join(pieces[first:]).lower()
        stem = ".".join(pieces[:first])
        if extension in known_extensions() and stem:
            return stem, extension
    return None


def make_safe_key(path: str) -> str:
    """A path without extension as a WebDataset key: dots of the last component become `_`."""
    folder, slash, stem = path.replace(os.sep, "/").lstrip("/").rpartition("/")
    return folder + slash + stem.replace(".", "_")


def get_modality_parts(modality: Modality) -> dict[str, tuple[str, ...]]:
    """All slots, optional ones too."""
    return {**modality.required_parts, **modality.optional_parts}


def readable_as(extensions: Iterable[str]) -> tuple[str, ...]:
    """The modalities that a sample with these extensions can be; one that uses only a part of what another uses is left out."""
    available = set(extensions)
    used: dict[str, set[str]] = {}
    for name, modality in all_modalities().items():
        if all(available & set(accepted) for accepted in modality.required_parts.values()):
            used[name] = {
                e
                for accepted in get_modality_parts(modality).values()
                for e in accepted
                if e in available
            }
    return tuple(n for n, mine in used.items() if not any(mine < other for other in used.values()))


def parse_modalities(text: str) -> tuple[str, ...]:
    """`image`, `image,audio`, or `text` (none) as a tuple.

    Raises:
        UsageError: an unknown name, or one given twice.
    """
    if text.strip() == TEXT_ONLY:
        return ()
    names = tuple(n.strip() for n in text.split(","))
    for name in names:
        get_modality(name)
    if len(set(names)) != len(names):
        raise UsageError(
            f"modality={text} names a modality twice.",
            "a sample has one run a modality.",
            "name each once.",
        )
    return names


def infer_modalities(kinds: Mapping[frozenset[str], int], where: Path) -> tuple[str, ...]:
    """The one modality that the samples are.

    Args:
        kinds: the sets of media extensions that samples have -> how many have it.

    Raises:
        UsageError: none, or several are possible.
    """
    votes: Counter[tuple[str, ...]] = Counter()
    for extensions, count in kinds.items():
        votes[readable_as(extensions)] += count
    del votes[()]
    if not votes:
        seen = ", ".join(sorted({f".{e}" for kind in kinds for e in kind}))
        raise UsageError(
            f"{where}: no file there is media of a known modality{f' (only {seen})' if seen else ''}.",
            "there is nothing to build from.",
            f"known extensions: {', '.join(sorted(known_extensions()))}.",
        )
    if len(votes) > 1 or len(next(iter(votes))) > 1:
        found = "; ".join(
            f"{count} of {' or '.join(names)}" for names, count in votes.most_common()
        )
        raise UsageError(
            f"{where}: the extensions do not tell the modality: {found}.",
            "a dataset has one modality, or one set of them that every sample has.",
            "say which: modality=NAME, or modality=NAME,NAME for samples that have several.",
        )
    return next(iter(votes))


def dataset_name(path: Path | RemotePath) -> str:
    """A folder's name with other characters than letters, digits and `._-` as `_`, and none of `.-` in front."""
    name = Path(os.path.abspath(path)).name if isinstance(path, Path) else path.name
    return re.sub(r"[^\w.-]", "_", name).lstrip(".-") or "dataset"
