"""`onellm shards index`: make existing tars readable as they are, without rewriting them.

They may come from img2dataset, video2dataset, or webdataset's ShardWriter.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError, SampleError, UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.hidden_files import has_hidden_part
from onellm_dist.common.progress import progress
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.dataset import (
    MANIFEST,
    Dataset,
    Manifest,
    ShardInfo,
    list_files,
    read_manifest,
    refuse_outside_links,
)
from onellm_dist.shards.format.energon import read_energon_splits
from onellm_dist.shards.format.index import ShardIndex, get_index_path
from onellm_dist.shards.format.index_media import index_media
from onellm_dist.shards.format.index_tar import SkippedMembers, try_index_tar
from onellm_dist.shards.format.media import LISTED
from onellm_dist.shards.format.names import (
    infer_modalities,
    is_compressed_tar,
    make_dataset_name,
)
from onellm_dist.shards.format.valid_names import check_name, find_bad_shard_path
from onellm_dist.shards.tools.foreign_media import find_media

SOURCE_NAME = "index"
"""The `source` of a manifest that was made for existing tars."""
_SPLITS = re.compile(r"(?:^|[/_.-])(train|val|validation|test)(?=[/_.-])")
_ARCHIVE = re.compile(
    r"\.(?:zip|rar|7z|tar"
    r"|tar\.(?:part|partial|tmp|temp|download|crdownload|aria2|[0-9]+|gz\.[^/]*))$",
    re.IGNORECASE,
)
"""Names of other archives, and of tars that are incomplete, cut into pieces or in capitals."""
_SHOWN = 5
"""Errors that a message shows."""


@dataclass(frozen=True)
class IndexedShards:
    """What was indexed."""

    tars: int
    samples: int
    manifest: Path | None
    """The manifest that makes the folder a dataset; None: a single tar was indexed."""
    kept: int = 0
    """Tars whose index already fitted."""
    notes: tuple[str, ...] = ()
    """What was skipped, in words."""


class _ExtensionSet(NamedTuple):
    """The samples that have one set of extensions."""

    samples: int
    tar: Path
    """The tar of the first such sample."""
    key: str
    offset: int


def index_existing_shards(
    path: Path,
    *,
    modalities: Sequence[str] | None = None,
    name: str | None = None,
    split: str | None = None,
    licence: str = "unknown",
    workers: int = 1,
    again: bool = True,
    follow_links: bool = False,
    media: bool = False,
) -> IndexedShards:
    """Index one tar, or all tars below a folder, which then gets a manifest and is a dataset.

    Tars are only read. A folder with a manifest of `onellm shards build` gets its indexes again and
    keeps the manifest.

    Args:
        path: a tar or a folder.
        modalities: what every sample has; () is text alone; default: inferred from the extensions
            of the parts.
        name: the dataset's name; default: the folder's.
        split: the split of all tars; default: what Energon's `.nv-meta/split.yaml` says, else that
            in the name of a folder or of the tar (`val/0.tar`, `test_subj01_0.tar`), else `train`.
        licence: goes to the manifest.
        workers: processes, each with a tar.
        again: False: skip the tars of a folder whose index fits (complete, new, of its size).
        follow_links: whether tars may be links that lead out of the folder.
        media: whether the indexes also list the media of each sample, with their sizes; a dataset
            of numbered parts (`0.jpg`), or of samples that differ, then lists its media.

    Raises:
        UsageError: there is no tar, one leads out of the folder, or the modality cannot be
            inferred.
        OneLLMError: a tar cannot be indexed, or a sample lacks a part; the message names tar, key
            and offset. The indexes of intact tars are kept; the manifest is not written.
    """
    if name is not None:
        check_name(name)
    if path.is_file():
        return _index_one_tar(path, media=media)
    if not path.is_dir():
        what = f"{path}: there is no such file or folder."
        raise UsageError(what, "there is nothing to index.", "check the path.")
    tars, notes = _list_tars(path, follow_links=follow_links)
    old = _read_manifest(path)
    todo = tars if again else [tar for tar in tars if not _has_fitting_index(tar)]
    kept = len(tars) - len(todo)
    skipped = _index_tars(todo, workers)
    if old is not None and old.source != SOURCE_NAME:
        manifest = _keep_manifest(path, old, media=media)
    else:
        modalities, listed = find_media(path, tars, modalities) if media else (modalities, False)
        if media:
            _index_all_media(tars, modalities or (), listed=listed)
        manifest = _make_manifest(path, tars, modalities, name, split, licence, listed=listed)
        write_atomic(path / MANIFEST, manifest.to_file())
    samples = sum(s.samples for s in manifest.shards)
    notes += _describe_skipped(skipped, "inside tars")
    return IndexedShards(len(tars), samples, path / MANIFEST, kept, notes)


def _index_one_tar(path: Path, *, media: bool) -> IndexedShards:
    if media:
        raise UsageError(
            f"{path}: --media of a single tar.",
            "which modalities its samples may have is known of a dataset.",
            "index its folder.",
        )
    skipped = _index_tars([path], workers=1)
    samples = ShardIndex(get_index_path(path)).samples
    return IndexedShards(1, samples, None, notes=_describe_skipped(skipped, "inside the tar"))


def _list_tars(root: Path, *, follow_links: bool) -> tuple[list[Path], tuple[str, ...]]:
    """List the tars below a folder, and say what else lies there that looks like one.

    Raises:
        UsageError: there is none, a path is not one that a manifest can name, or leads out.
    """
    found = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if is_compressed_tar(name) or _ARCHIVE.search(name)
    )
    paths = [p.relative_to(root).as_posix() for p in found]
    visible = [p for p in paths if not has_hidden_part(p)]
    tars = [p for p in visible if p.endswith(".tar") and (root / p).is_file()]
    packed = [p for p in visible if is_compressed_tar(p)]
    others = [p for p in visible if not p.endswith(".tar") and not is_compressed_tar(p)]
    gone = [p for p in visible if p.endswith(".tar") and not (root / p).is_file()]
    hidden = sum(p.endswith(".tar") and has_hidden_part(p) for p in paths)
    notes = _describe_hidden(hidden, "beside the tars")
    why = "samples cannot be reached by byte range; unpack to .tar first"
    notes += _describe_unread(packed, "compressed tar", why)
    notes += _describe_unread(others, "other archive", "only files called .tar are")
    notes += _describe_unread(gone, "name of a .tar", "it is a link to nothing, or no file")
    if not tars:
        raise UsageError(
            f"{root}: there is no .tar below it{f' ({notes[0]})' if notes else ''}.",
            "there is nothing to index.",
            "check the path.",
        )
    bad = find_bad_shard_path(tars)
    if bad is not None:
        raise UsageError(
            f"{root}: the name of the tar {bad!a} has control characters or is not UTF-8.",
            "a manifest cannot list it.",
            "rename it.",
        )
    if not follow_links:
        refuse_outside_links(root, list_files(root, tars)[1])
    return [root / tar for tar in tars], notes


def _describe_unread(paths: Sequence[str], what: str, why: str) -> tuple[str, ...]:
    if not paths:
        return ()
    named = ", ".join(paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")
    return (f"{format_count(len(paths), what)} not read ({named}): {why}",)


def _describe_hidden(count: int, where: str) -> tuple[str, ...]:
    names = format_count(count, "hidden file")
    return (f"{names} {where} skipped (names that begin with a dot)",) if count else ()


def _describe_skipped(skipped: SkippedMembers, where: str) -> tuple[str, ...]:
    notes = _describe_hidden(skipped.hidden, where)
    if skipped.links:
        names = format_count(skipped.links, "link")
        notes += (
            f"{names} {where} skipped: they hold no bytes, so their samples lack these parts "
            "(tar --dereference --hard-dereference stores the files instead)",
        )
    return notes


def _has_fitting_index(tar: Path) -> bool:
    """Check for a complete index, made for a file of this name and size after its last change."""
    path = get_index_path(tar)
    try:
        index, written = ShardIndex(path), tar.stat()
        made = path.stat().st_mtime_ns
    except (OneLLMError, OSError):
        return False
    return (index.tar_name, index.tar_bytes) == (
        tar.name,
        written.st_size,
    ) and made >= written.st_mtime_ns


def _read_manifest(path: Path) -> Manifest | None:
    return read_manifest(path) if (path / MANIFEST).exists() else None


def _index_tars(tars: Sequence[Path], workers: int) -> SkippedMembers:
    """Index tars, and return what was skipped inside them.

    Raises:
        OneLLMError: one cannot be indexed; the others are.
    """
    results: list[OneLLMError | SkippedMembers] = []
    with progress(len(tars), "Indexing", unit="tars") as bar:
        if workers == 1 or len(tars) < 2:
            for tar in tars:
                results.append(try_index_tar(tar))
                bar.advance()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for result in pool.map(try_index_tar, tars):
                    results.append(result)
                    bar.advance()
    errors = [result for result in results if isinstance(result, OneLLMError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        more = f"\nand {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise OneLLMError(
            "\n".join(e.what for e in errors[:_SHOWN]) + more,
            f"{len(errors)} of {len(tars)} tars cannot be used; no manifest was written.",
            errors[0].do,
        )
    found = [result for result in results if isinstance(result, SkippedMembers)]
    return SkippedMembers(sum(one.hidden for one in found), sum(one.links for one in found))


def _keep_manifest(root: Path, manifest: Manifest, *, media: bool) -> Manifest:
    """Check the new indexes of a builder's dataset, and add the media that they should list.

    Raises:
        OneLLMError: a tar is not the one that was built.
    """
    _compare_indexes(root, manifest)
    if media or manifest.lists_media:
        tars = [root / shard.path for shard in manifest.shards]
        _index_all_media(tars, manifest.modalities, listed=manifest.lists_media)
    return manifest


def _compare_indexes(root: Path, manifest: Manifest) -> None:
    """Compare the new indexes with the manifest of a builder.

    Raises:
        OneLLMError: a tar is not the one that was built.
    """
    dataset = Dataset(root, manifest)
    for shard in manifest.shards:
        dataset.index(shard)


def _make_manifest(
    root: Path,
    tars: Sequence[Path],
    modalities: Sequence[str] | None,
    name: str | None,
    split: str | None,
    licence: str,
    *,
    listed: bool,
) -> Manifest:
    shards, sets = list[ShardInfo](), dict[frozenset[str], _ExtensionSet]()
    energon = read_energon_splits(root)
    for tar in tars:
        relative = tar.relative_to(root).as_posix()
        if energon is not None and relative not in energon:
            continue  # Energon's split.yaml excludes it
        found = split or (energon[relative] if energon is not None else _infer_split(relative))
        index = ShardIndex(get_index_path(tar))
        shards.append(ShardInfo(relative, found, index.samples, index.tar_bytes, index.tar_sha256))
        for extensions, (count, row) in index.extension_sets().items():
            first = sets.get(extensions, _ExtensionSet(0, tar, index.key(row), index.span(row)[0]))
            sets[extensions] = first._replace(samples=first.samples + count)
    _check_splits(root, shards)
    _check_names(root, shards)
    if modalities is None:
        votes: Counter[frozenset[str]] = Counter()
        for extensions, seen in sets.items():
            votes[extensions - set(TEXT_EXTENSIONS)] += seen.samples
        modalities = infer_modalities(votes, root)
    if not listed:
        _check_parts(sets, modalities)
    text = tuple(e for e in TEXT_EXTENSIONS if all(e in extensions for extensions in sets))
    return Manifest(
        name or make_dataset_name(root),
        tuple(modalities),
        text,
        licence,
        SOURCE_NAME,
        tuple(shards),
        dict(LISTED) if listed else {},
    )


def _index_all_media(tars: Sequence[Path], modalities: Sequence[str], *, listed: bool) -> None:
    """Add the media of their samples to the indexes of tars that lack them.

    Raises:
        OneLLMError: the media of a sample cannot be listed.
    """
    with progress(len(tars), "Reading headers of media", unit="tars") as bar:
        for tar in tars:
            if ShardIndex(get_index_path(tar)).media is None:
                fault = index_media(tar, modalities, listed=listed)
                if fault is not None:
                    raise fault
            bar.advance()


def _infer_split(relative: str) -> str:
    named = _SPLITS.search(relative)
    return named.group(1) if named else "train"


def _check_splits(root: Path, shards: Sequence[ShardInfo]) -> None:
    """Check that the names of the splits are names; Energon's file may say anything."""
    bad = next((s for s in shards if not s.split or not s.split.isprintable()), None)
    if bad is not None:
        raise UsageError(
            f"{root}: the split of {bad.path} is {bad.split!r}, which is not a name.",
            "a mixture names splits.",
            "name it with letters, digits, _ and -.",
        )


def _check_names(root: Path, shards: Sequence[ShardInfo]) -> None:
    """Check that no two shards have the same name."""
    names = Counter(s.name for s in shards)
    if len(names) < len(shards):
        twice = names.most_common(1)[0][0]
        paths = ", ".join(s.path for s in shards if s.name == twice)
        raise UsageError(
            f"{root}: two tars would both be the shard {twice!r}: {paths}.",
            "a shard's name is part of its samples' ids.",
            "rename one of them.",
        )


def _check_parts(sets: Mapping[frozenset[str], _ExtensionSet], modalities: Sequence[str]) -> None:
    """Check that every sample has the parts of the modalities."""
    for extensions, seen in sets.items():
        for modality in modalities:
            try:
                get_modality(modality).match(set(extensions))
            except SampleError as error:
                such = format_count(seen.samples, "such sample")
                raise OneLLMError(
                    f"{seen.tar}, key {seen.key}, at offset {seen.offset}: {error.what} ({such}).",
                    f"every sample of a dataset of {', '.join(modalities)} must have its parts.",
                    "leave such samples out when the tars are written, or name another modality.",
                ) from error
