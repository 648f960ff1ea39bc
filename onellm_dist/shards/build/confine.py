"""Keep a build inside its input: `..`, absolute paths and links in it lead nowhere else.

Lists and archives come from others, and so do the paths and links in them. A sample whose media lie
outside is a bad sample, unless the user named the place: by an option of the source (`media`,
`root`), or by `follow`.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.base import RawSample, Source
from onellm_dist.shards.storage.paths import RemotePath, StoragePath, to_storage_path

ANYWHERE = "any"
"""`follow=any`: paths and links may lead anywhere."""


def find_allowed_roots(
    source: Source, inputs: StoragePath, options: Mapping[str, Any], follow: str | None
) -> tuple[str, ...] | None:
    """Find the folders and URLs in which the media of a build may lie.

    Args:
        source: the source, which says which of its options name places.
        inputs: the input of the build.
        options: the source's own, complete.
        follow: the builder's option: folders separated by commas, or ANYWHERE.

    Returns:
        Real paths of folders and URLs, the input's first; None: anywhere.

    Raises:
        UsageError: `follow` names a folder that does not exist.
    """
    if follow == ANYWHERE:
        return None
    _resolve_folder.cache_clear()  # links may have changed since an earlier build
    is_folder = inputs.is_dir()
    start = inputs if is_folder else inputs.parent
    roots = [start]
    for name, value in options.items():
        named = source.options[name].kind is Path or name in source.places
        if named and value is not None:
            roots += _list_named_places(start, str(value))
    for text in follow.split(",") if follow else ():
        place = to_storage_path(text.strip())
        if not place.exists():
            raise UsageError(
                f"follow={text.strip()}: there is no such folder.",
                "paths and links of the input may lead there.",
                f"check the option follow (or give follow={ANYWHERE}).",
            )
        roots.append(place)
    found = dict.fromkeys(_resolve(root) for root in roots)
    return (*found, *(blobs for root in found if (blobs := _find_hub_blobs(root))))


def confine(raw_samples: Iterable[RawSample], roots: tuple[str, ...] | None) -> Iterator[RawSample]:
    """Yield raw samples; those whose media lie outside of the roots have a problem and no media.

    Args:
        raw_samples: from a source.
        roots: from `find_allowed_roots`.
    """
    for raw_sample in raw_samples:
        outside = None if roots is None else _find_outside(raw_sample, roots)
        if outside is None or roots is None:
            yield raw_sample
            continue
        path, real = outside
        leads = "lies" if real == str(path) else f"leads to {real}, which lies"
        problem = (
            f"outside of the input: {path} {leads} not in {' or '.join(roots)}; "
            f"-o follow={posixpath.dirname(real)} allows it"
        )
        yield replace(raw_sample, parts={}, skip=None, problem=raw_sample.problem or problem)


def _find_outside(raw_sample: RawSample, roots: tuple[str, ...]) -> tuple[StoragePath, str] | None:
    """Return the first path of a sample's media that lies outside, and where it really lies."""
    for media in raw_sample.parts.values():
        for path in _list_paths(media):
            real = _resolve(path)
            if not any(real == r or real.startswith(f"{r.rstrip('/')}/") for r in roots):
                return path, real
    return None


def _list_paths(media: Any) -> Iterator[StoragePath]:
    """Yield the paths that media are read from: fields of dataclasses, and of those in them."""
    if isinstance(media, (Path, RemotePath)):
        yield media
    elif isinstance(media, (tuple, list)):
        for one in media:
            yield from _list_paths(one)
    elif dataclasses.is_dataclass(media):
        for field in dataclasses.fields(media):
            yield from _list_paths(getattr(media, field.name))


def _list_named_places(start: StoragePath, value: str) -> Iterator[StoragePath]:
    """Yield the folders that an option names, as `A`, `A,B` or `OLD=NEW,OLD=NEW`."""
    for text in dict.fromkeys((value, *value.replace("=", ",").split(","))):
        try:
            place = to_storage_path(text) if text.strip() else None
        except UsageError:  # OLD of a pair, say, is in no store
            place = None
        if place is None:
            continue
        candidates = [place]
        if isinstance(place, Path) and not place.is_absolute():
            candidates.append(start / text)
        for candidate in candidates:
            if isinstance(candidate, RemotePath) or candidate.is_dir():
                yield candidate
            elif candidate.is_file():
                yield candidate.parent


def _resolve(path: StoragePath) -> str:
    """Return the real path of a local file, or a normal form of a URL."""
    if isinstance(path, RemotePath):
        scheme, _, rest = path.url.partition("://")
        if scheme in ("http", "https"):
            rest = unquote(rest)  # a server reads `%2e%2e` as `..`
        return f"{scheme}://{posixpath.normpath(rest)}"
    try:
        if path.is_symlink():
            return os.path.realpath(path)
        if path.name in ("", ".", ".."):
            return os.path.realpath(path)
    except (OSError, ValueError):  # a name that no file can have: reading it will say so
        return os.path.abspath(str(path).replace("\0", "?"))
    # From the working directory, and not normalised: `..` behind a link is the link's parent.
    return os.path.join(_resolve_folder(os.path.join(os.getcwd(), path.parent)), path.name)


@lru_cache(maxsize=4096)
def _resolve_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _find_hub_blobs(root: str) -> str | None:
    """Return where a snapshot of the Hugging Face cache keeps its files, to which its names link.

    `models--x/snapshots/REVISION/data.parquet` is a link to `models--x/blobs/HASH`.
    """
    parts = Path(root).parts
    if "://" in root or "snapshots" not in parts:
        return None
    at = len(parts) - 1 - parts[::-1].index("snapshots")
    blobs = Path(*parts[:at], "blobs")
    return str(blobs) if blobs.is_dir() else None
