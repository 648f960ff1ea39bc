"""`onellm shards verify`: read every byte of a dataset, and name each fault with its place."""

from __future__ import annotations

import os
import shlex
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, SampleError
from onellm_dist.common.files import STAGED, sha256_file
from onellm_dist.common.hidden_files import has_hidden_part
from onellm_dist.common.output import write_output
from onellm_dist.common.progress import progress
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.dataset import Manifest, ShardInfo
from onellm_dist.shards.format.index import (
    SUFFIX,
    IndexRows,
    PartLocation,
    ShardIndex,
    get_index_path,
)
from onellm_dist.shards.format.index_media import read_media
from onellm_dist.shards.format.tars import TarError, scan_tar
from onellm_dist.shards.storage.remote import is_url
from onellm_dist.shards.tools.repeated_keys import RepeatedKeyFinder, SampleRow, hash_keys
from onellm_dist.shards.tools.shard_files import (
    DatasetRoot,
    find_datasets,
    list_names,
    open_root,
    open_shard_files,
)


@dataclass(frozen=True)
class ShardProblem:
    """One fault of a dataset."""

    shard: str
    """Path of the tar, or of another file at fault, in the dataset."""
    what: str
    key: str | None = None
    offset: int | None = None
    """Offset in the tar: of the part's content, or of a header if a header is at fault."""

    def __str__(self) -> str:
        """The fault as a line for the user."""
        key = f", key {self.key}" if self.key is not None else ""
        offset = f", offset {self.offset}" if self.offset is not None else ""
        return f"{self.shard}{key}{offset}: {self.what}"


def verify_dataset(
    path: Path | str, *, workers: int = 1, follow_links: bool = False
) -> list[ShardProblem]:
    """Check a dataset.

    Faults are flipped bytes, truncated tars, duplicate keys, keys that no reader would find,
    missing parts, stale indexes, stray files. Memory does not grow with the number of samples (see
    `RepeatedKeyFinder`); the rows of one shard a worker are held.

    Args:
        path: the dataset's folder, or its URL; a remote shard is copied to the folder for temporary
            files while it is checked.
        workers: processes, each with a shard at a time.
        follow_links: whether files may be links that lead out of the folder.

    Returns:
        The faults, in the manifest's order of shards; empty: every byte is as it was written.

    Raises:
        UsageError: there is no dataset, or its manifest cannot be read, or a file leads out.
    """
    root, manifest = open_root(path, follow_links=follow_links)
    problems, count = dict[int, list[ShardProblem]](), 0
    with RepeatedKeyFinder(sum(s.samples for s in manifest.shards)) as finder:
        with progress(len(manifest.shards), f"Verifying {manifest.name}", unit="shards") as bar:
            for number, (found, keys) in enumerate(_verify_shards(root, manifest, workers)):
                if found:
                    problems[number] = found
                    count += len(found)
                finder.add(number, keys)
                bar.advance()
                bar.note(format_count(count, "problem") if count else "")
        for number, found in _name_repeated_keys(root, manifest, finder.find_repeats()):
            problems.setdefault(number, []).extend(found)
    listed = [p for number in sorted(problems) for p in problems[number]]
    return listed + _find_stray_files(root, manifest)


def _name_repeated_keys(
    root: DatasetRoot, manifest: Manifest, repeats: Sequence[tuple[SampleRow, SampleRow]]
) -> Iterator[tuple[int, list[ShardProblem]]]:
    """Yield (number of a shard, its samples whose key an earlier shard has).

    Only such shards are read again, for the text of the keys.
    """
    for number, pairs in groupby(repeats, key=lambda pair: pair[1].shard):
        shard = manifest.shards[number]
        with open_shard_files(root, shard) as folder:
            rows = read_shard_rows(folder / shard.path)
        keys = rows.keys if rows is not None else []
        yield (
            number,
            [
                ShardProblem(
                    shard.path,
                    f"duplicate key: {manifest.shards[first.shard].path} has it too",
                    keys[later.row],
                )
                for first, later in pairs
                if later.row < len(keys)
            ],
        )


def read_shard_rows(tar: Path) -> IndexRows | None:
    """Read what a tar holds from its own structure or, if that is broken, from its index.

    Returns:
        None if neither can be read.
    """
    try:
        return scan_tar(tar).rows
    except TarError:
        index = _open_index(tar, None, [])
        return index.rows() if index is not None else None


def _verify_shards(
    root: DatasetRoot, manifest: Manifest, workers: int
) -> Iterator[tuple[list[ShardProblem], NDArray[np.uint64]]]:
    arguments = (
        [root] * len(manifest.shards),
        manifest.shards,
        [manifest.modalities] * len(manifest.shards),
        [manifest.text] * len(manifest.shards),
        [manifest.lists_media] * len(manifest.shards),
    )
    if workers == 1:
        yield from map(verify_shard, *arguments)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from pool.map(verify_shard, *arguments)


def verify_shard(
    root: DatasetRoot,
    shard: ShardInfo,
    modalities: Sequence[str],
    text: Sequence[str],
    lists_media: bool = False,
) -> tuple[list[ShardProblem], NDArray[np.uint64]]:
    """Verify one shard.

    Args:
        root: the dataset's folder.
        shard: the shard.
        modalities: what every sample has.
        text: which of `.txt` and `.json` every sample has.
        lists_media: whether each sample lists its media; `modalities` are then what it may have.

    Returns:
        The faults, and the hashes of the keys, [samples, 2].
    """
    try:
        with open_shard_files(root, shard) as folder:
            tar = folder / shard.path
            if not tar.is_file():
                return [ShardProblem(shard.path, "missing: the manifest lists it")], hash_keys([])
            needed = () if lists_media else modalities
            problems, keys = _verify_tar(tar, shard, needed, text)
            if not problems:  # the index is the tar's
                problems = _compare_media(tar, shard.path, modalities, listed=lists_media)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        how = f"cannot be read: {error.strerror or error}{where}"
        return [ShardProblem(shard.path, how)], hash_keys([])
    return problems, hash_keys(keys)


def _verify_tar(
    tar: Path, shard: ShardInfo, modalities: Sequence[str], text: Sequence[str]
) -> tuple[list[ShardProblem], list[str]]:
    problems: list[ShardProblem] = []
    index = _open_index(tar, shard, problems)
    try:
        scan = scan_tar(tar)
        rows, digest = scan.rows, scan.sha256
    except TarError as error:
        problems.append(ShardProblem(shard.path, error.how, error.key, error.offset))
        rows, digest = None, sha256_file(tar)
    if index is not None:
        in_index = index.rows()
        problems += (
            _compare_rows(shard.path, in_index, rows)
            if rows is not None
            else _check_checksums(tar, shard.path, in_index)
        )
        rows = rows or in_index
    if rows is not None:
        problems += _find_missing_parts(shard.path, rows, modalities, text)
    if digest != shard.sha256 and not problems:
        problems.append(
            ShardProblem(
                shard.path,
                f"SHA-256 is {digest[:16]}..., the manifest says {shard.sha256[:16]}... "
                "(every part is intact: headers or padding changed)",
            )
        )
    return list(dict.fromkeys(problems)), rows.keys if rows is not None else []


def _open_index(
    tar: Path, shard: ShardInfo | None, problems: list[ShardProblem]
) -> ShardIndex | None:
    name = f"{shard.path if shard is not None else tar.name}.index"
    try:
        index = ShardIndex(get_index_path(tar))
    except FileNotFoundError:
        problems.append(ShardProblem(name, "missing index"))
        return None
    except OneLLMError as error:
        how = error.what.removeprefix(f"{get_index_path(tar)} is ").removesuffix(".")
        problems.append(ShardProblem(name, f"damaged index: {how}"))
        return None
    if shard is None:
        return index
    if index.tar_sha256 != shard.sha256:
        problems.append(
            ShardProblem(
                name,
                f"stale index: made for a tar of SHA-256 {index.tar_sha256[:16]}..., "
                f"the manifest says {shard.sha256[:16]}...",
            )
        )
    elif index.samples != shard.samples:
        problems.append(
            ShardProblem(
                name,
                f"stale index: it has {index.samples} samples, the manifest says {shard.samples}",
            )
        )
    return index


def _compare_rows(shard: str, index: IndexRows, tar: IndexRows) -> Iterator[ShardProblem]:
    """Yield where a tar that can be read through differs from its index."""
    in_tar = dict(zip(tar.keys, tar.parts, strict=True))
    for key, expected in zip(index.keys, index.parts, strict=True):
        found = in_tar.pop(key, None)
        if found is None:
            yield ShardProblem(
                shard,
                "missing sample: the index has it, the tar does not",
                key,
                next(iter(expected.values())).offset,
            )
            continue
        for extension, location in expected.items():
            if extension not in found:
                yield ShardProblem(
                    shard,
                    f"missing part .{extension}: the index has it, the tar does not",
                    key,
                    location.offset,
                )
            elif found[extension][:2] != location[:2]:
                now = found[extension]
                yield ShardProblem(
                    shard,
                    f"stale index: part .{extension} lies at {now.offset} ({now.size} bytes)",
                    key,
                    location.offset,
                )
            elif found[extension].crc32 != location.crc32:
                yield _make_flipped(shard, key, extension, location)
        for extension in found.keys() - expected.keys():
            yield ShardProblem(
                shard, f"stale index: part .{extension} is not in it", key, found[extension].offset
            )
    for key, found in in_tar.items():
        yield ShardProblem(
            shard, "stale index: the sample is not in it", key, next(iter(found.values())).offset
        )


def _check_checksums(tar: Path, shard: str, index: IndexRows) -> Iterator[ShardProblem]:
    """Check each part where the index says it lies, because the tar's own structure is broken."""
    with tar.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for key, parts in zip(index.keys, index.parts, strict=True):
            for extension, location in parts.items():
                file.seek(location.offset)
                if location.offset + location.size > size:
                    there = max(0, size - location.offset)
                    yield ShardProblem(
                        shard,
                        f"truncated: part .{extension} has {there} of its {location.size} bytes",
                        key,
                        location.offset,
                    )
                elif zlib.crc32(file.read(location.size)) != location.crc32:
                    yield _make_flipped(shard, key, extension, location)


def _make_flipped(shard: str, key: str, extension: str, location: PartLocation) -> ShardProblem:
    return ShardProblem(
        shard,
        f"part .{extension} ({location.size} bytes) fails its CRC-32: bytes were changed",
        key,
        location.offset,
    )


def _find_missing_parts(
    shard: str, rows: IndexRows, modalities: Sequence[str], text: Sequence[str]
) -> Iterator[ShardProblem]:
    checks = [get_modality(name) for name in modalities]
    for key, start, parts in zip(rows.keys, rows.starts, rows.parts, strict=True):
        for modality in checks:
            try:
                modality.match(set(parts))
            except SampleError as error:
                yield ShardProblem(shard, f"missing part: {error.what}", key, start)
        for extension in text:
            if extension not in parts:
                yield ShardProblem(
                    shard,
                    f"missing part .{extension}: the manifest says that every sample has it",
                    key,
                    start,
                )


def _compare_media(
    tar: Path, shard: str, modalities: Sequence[str], *, listed: bool
) -> list[ShardProblem]:
    """Compare the media that an index lists with those of an intact tar."""
    index = ShardIndex(get_index_path(tar))
    if index.media is None:
        how = "stale index: it does not list the media of the samples"
        return [ShardProblem(shard, how)] if listed else []
    problems = list[ShardProblem]()
    for row, found in enumerate(read_media(tar, index, modalities, listed=listed)):
        if isinstance(found, SampleError):
            problems.append(ShardProblem(shard, f"media: {found.what}", index.key(row)))
        elif found != index.media.get(row):
            how = "stale index: the media of the sample differ from what it lists"
            problems.append(ShardProblem(shard, how, index.key(row)))
    return problems


def _find_stray_files(root: DatasetRoot, manifest: Manifest) -> list[ShardProblem]:
    listed = {p for s in manifest.shards for p in (s.path, s.path + SUFFIX)}
    problems = []
    for path in sorted(list_names(root, (s.path for s in manifest.shards))):
        if has_hidden_part(path):
            continue
        if path.endswith(STAGED):
            problems.append(
                ShardProblem(path, "left by a writer that was stopped; it may be removed")
            )
        elif path.endswith((".tar", f".tar{SUFFIX}")) and path not in listed:
            problems.append(ShardProblem(path, "not in the manifest: nothing reads it"))
    return problems


def verify_command(path: Path | str, *, workers: int = 1, follow_links: bool = False) -> int:
    """Run `onellm shards verify`: print the faults of a dataset, or of all datasets in a folder.

    Returns:
        The exit code: 1 if there are faults.
    """
    total = 0
    for dataset in find_datasets(path):
        problems = verify_dataset(str(dataset), workers=workers, follow_links=follow_links)
        total += len(problems)
        for problem in problems:
            write_output(str(problem))
        where = str(dataset)
        count = format_count(len(problems), "problem")
        if problems and not is_url(where):
            count += f"; repair what can be repaired: onellm shards repair {shlex.quote(where)}"
        write_output(f"{where}: {count if problems else 'every byte is as it was written'}")
    return EXIT_FAILED if total else EXIT_DONE
