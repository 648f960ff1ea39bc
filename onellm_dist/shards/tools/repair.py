"""`onellm shards repair`: repair what can be repaired without inventing data.

Every good sample is kept.

| fault | repair |
|---|---|
| a lost, damaged or stale index | made again from the tar |
| a sample with a part that fails its CRC-32, a sample cut off by the end of the tar, a damaged
header | the tar is written again without it | | a key that exists twice (in one tar, or in two) |
the first sample is kept | | a sample without the parts of the dataset's modalities | left out |
| a tar of the manifest that is missing, or holds no good sample any more | removed from the
manifest | | files of a stopped writer or repair | removed |

A sample whose key `index` refuses, and an older program accepted, is kept: its bytes are good.

A tar is written again under a name of its own, and takes effect with the manifest, which is
replaced at the end (repair_transaction.py); the old bytes stay as `NAME.tar.damaged` until the
user removes them.
"""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_DONE, OneLLMError, SampleError, UsageError
from onellm_dist.common.files import sha256_file
from onellm_dist.common.output import write_output
from onellm_dist.common.progress import progress
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.dataset import (
    Manifest,
    ShardInfo,
    list_files,
    read_manifest,
    refuse_outside_links,
)
from onellm_dist.shards.format.energon import META, write_energon
from onellm_dist.shards.format.index import PartLocation, ShardIndex, get_index_path
from onellm_dist.shards.format.index_media import read_media
from onellm_dist.shards.format.tar_writer import ShardWriter
from onellm_dist.shards.format.tars import salvage_tar
from onellm_dist.shards.sources.base import QuarantinedSample
from onellm_dist.shards.storage.remote import is_url
from onellm_dist.shards.tools.repair_transaction import (
    REPAIRED,
    RepairTransaction,
    clean_up,
    hold_dataset,
)
from onellm_dist.shards.tools.repeated_keys import RepeatedKeyFinder, hash_keys


class _Survey(NamedTuple):
    """What the first pass finds in a shard."""

    intact: bool
    """The tar has the manifest's SHA-256."""
    hashes: NDArray[np.uint64]
    """[n, 2] hashes of the keys of its good samples."""
    rows: list[int]
    """The rows of its good samples."""


def repair_dataset(root: Path, *, workers: int = 1) -> list[str]:
    """Repair a dataset in place.

    Args:
        root: the dataset's folder.
        workers: processes that look for faults, each with a shard at a time; one process repairs.

    Returns:
        What was done, a line each; empty: there was nothing to do.

    Raises:
        UsageError: there is no dataset, its manifest is not valid, or a file leads out of its
            folder through a link; then nothing was changed.
        OneLLMError: no good sample is left; then nothing was changed.
    """
    manifest = read_manifest(root)
    refuse_outside_links(
        root,
        [*list_files(root, (s.path for s in manifest.shards))[1], META, REPAIRED],
        remedy="a repair would change what lies there: repair the dataset in which the file lies, "
        "or put a copy in place of each link (cp --remove-destination FILE LINK).",
    )
    with hold_dataset(root):
        change = RepairTransaction(
            root, media_of=manifest.modalities if manifest.lists_media else None
        )
        try:
            shards = _repair_shards(root, manifest, workers, change)
        except BaseException:
            change.abandon()
            raise
        repaired = replace(manifest, shards=tuple(shards))
        clean_up(root, manifest, change.done, keep=change.get_created())
        change.commit(repaired, changed=repaired != manifest)
        if change.done and (root / META).is_dir():
            write_energon(root)
    return change.done


def _repair_shards(
    root: Path, manifest: Manifest, workers: int, change: RepairTransaction
) -> list[ShardInfo]:
    """Repair every shard, and return those that are left.

    Raises:
        OneLLMError: none is.
    """
    shards = list[ShardInfo]()
    intact, repeated = _survey_dataset(root, manifest, workers)
    for number, shard in enumerate(manifest.shards):
        rows = repeated.get(number, {})
        repaired = _repair_shard(root, manifest, shard, intact[number], rows, change)
        shards += [repaired] if repaired is not None else []
    if not shards:
        raise OneLLMError(
            f"{root}: no good sample is left.",
            "an empty dataset cannot be read, so nothing was changed.",
            "restore the tars, or build again.",
        )
    return shards


def _survey_dataset(
    root: Path, manifest: Manifest, workers: int
) -> tuple[list[bool], dict[int, dict[int, str]]]:
    """Read every byte once. Memory does not grow with the number of samples.

    Returns:
        Which tars are intact; and shard to row to the earlier shard that has a good sample of the
        same key.
    """
    intact, repeated = list[bool](), dict[int, dict[int, str]]()
    with RepeatedKeyFinder(sum(s.samples for s in manifest.shards)) as finder:
        with progress(len(manifest.shards), f"Checking {manifest.name}", unit="shards") as bar:
            for number, survey in enumerate(_survey_shards(root, manifest, workers)):
                intact.append(survey.intact)
                finder.add(number, survey.hashes, survey.rows)
                bar.advance()
        for first, later in finder.find_repeats():
            repeated.setdefault(later.shard, {})[later.row] = manifest.shards[first.shard].path
    return intact, repeated


def _survey_shards(root: Path, manifest: Manifest, workers: int) -> Iterator[_Survey]:
    slim = replace(manifest, shards=(), attributes={})  # it is pickled with every shard
    if workers == 1:
        yield from (_survey_shard(root, slim, shard) for shard in manifest.shards)
        return
    count = len(manifest.shards)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_survey_shard, [root] * count, [slim] * count, manifest.shards)


def _survey_shard(root: Path, manifest: Manifest, shard: ShardInfo) -> _Survey:
    tar = root / shard.path
    exists = tar.is_file()
    intact = exists and sha256_file(tar) == shard.sha256
    found = enumerate(_list_samples(tar, _open_trusted_index(tar, shard), intact)) if exists else ()
    good = [
        (row, key)
        for row, (key, parts, fault) in found
        if fault is None and _find_missing_part(manifest, parts) is None
    ]
    return _Survey(intact, hash_keys([key for _, key in good]), [row for row, _ in good])


def _repair_shard(
    root: Path,
    manifest: Manifest,
    shard: ShardInfo,
    intact: bool,
    repeated: Mapping[int, str],
    change: RepairTransaction,
) -> ShardInfo | None:
    """Repair one shard, and return what it is then; None: it no longer exists."""
    tar = root / shard.path
    if not tar.is_file():
        change.done.append(
            f"{shard.path}: missing; removed from the manifest "
            f"({format_count(shard.samples, 'sample')})"
        )
        return None
    index, trusted = _open_index(tar), _open_trusted_index(tar, shard)
    samples, faults = dict[str, dict[str, PartLocation]](), list[QuarantinedSample]()
    for row, (key, parts, fault) in enumerate(_list_samples(tar, trusted, intact)):
        reason = fault or _find_missing_part(manifest, parts)
        if reason is None and row in repeated:
            reason = f"duplicate key: {repeated[row]} has it"
        if reason is None:
            samples[key] = parts
        else:
            faults.append(QuarantinedSample(key, shard.path, reason))
    if not faults and intact:
        if (
            index is None
            or (index.tar_sha256, index.samples) != (shard.sha256, len(samples))
            or index.tar_name != tar.name
            or (manifest.lists_media and _has_stale_media(tar, index, manifest))
        ):
            change.renew_index(tar)
            change.done.append(f"{shard.path}: index made again")
        return shard
    if not faults and trusted is None and salvage_tar(tar)[1] is None:
        return _accept_tar(tar, shard, len(samples), change)
    change.lost += faults
    change.done += [f"{shard.path}, key {q.key}: {q.reason}; left out" for q in faults]
    return _rewrite_shard(root, shard, samples, change)


def _has_stale_media(tar: Path, index: ShardIndex, manifest: Manifest) -> bool:
    """Whether an index does not list the media that the samples of its tar can be read to have."""
    listed = index.media
    if listed is None:
        return True
    found = list(read_media(tar, index, manifest.modalities, listed=True))
    if any(isinstance(media, SampleError) for media in found):
        return False  # these could not be written either
    return any(media != listed.get(row) for row, media in enumerate(found))


def _accept_tar(tar: Path, shard: ShardInfo, samples: int, change: RepairTransaction) -> ShardInfo:
    """Accept another tar, which has only good samples."""
    change.renew_index(tar)
    info = ShardInfo(shard.path, shard.split, samples, tar.stat().st_size, sha256_file(tar))
    change.done.append(
        f"{shard.path}: accepted as it is now ({format_count(info.samples, 'sample')}, "
        f"{shard.samples} before); "
        "index and manifest updated"
    )
    return info


def _open_index(tar: Path) -> ShardIndex | None:
    try:
        return ShardIndex(get_index_path(tar))
    except (OSError, OneLLMError):
        return None


def _open_trusted_index(tar: Path, shard: ShardInfo) -> ShardIndex | None:
    """Open the index if it says where the samples of this tar lie.

    It must be the manifest's, and the tar must not be another intact tar of another length.
    """
    index = _open_index(tar)
    if index is None or index.tar_sha256 != shard.sha256:
        return None
    same = tar.stat().st_size == shard.bytes or salvage_tar(tar)[1] is not None
    return index if same else None


def _list_samples(
    tar: Path, index: ShardIndex | None, intact: bool
) -> Iterator[tuple[str, dict[str, PartLocation], str | None]]:
    """Yield every sample that leaves a trace: key, parts, and what is wrong with it.

    A usable index knows the checksums, and samples behind a damaged header. Without one, the tar is
    read as far as it can be.
    """
    if index is None:
        rows, how = salvage_tar(tar)
        for key, parts in zip(rows.keys, rows.parts, strict=True):
            yield key, parts, None
        if how is not None:
            rest = f"(behind {rows.keys[-1]})" if rows.keys else "(all)"
            yield rest, {}, f"unreadable tar: {how}"
        return
    with tar.open("rb") as file:
        for row in range(index.samples):
            parts, key = index.parts(row), index.key(row)
            fault = None
            for extension, location in parts.items() if not intact else ():
                file.seek(location.offset)
                if zlib.crc32(file.read(location.size)) != location.crc32:
                    where = f".{extension} at offset {location.offset}"
                    fault = f"damaged part: {where} fails its CRC-32"
            yield key, parts, fault


def _find_missing_part(manifest: Manifest, parts: Mapping[str, PartLocation]) -> str | None:
    """Return which part of the dataset's modalities or texts a sample lacks; None: none."""
    for name in () if manifest.lists_media else manifest.modalities:
        try:
            get_modality(name).match(set(parts))
        except SampleError as error:
            return f"missing part: {error.what}"
    missing = [e for e in manifest.text if e not in parts]
    return f"missing part: .{missing[0]}" if missing else None


def _rewrite_shard(
    root: Path,
    shard: ShardInfo,
    samples: Mapping[str, Mapping[str, PartLocation]],
    change: RepairTransaction,
) -> ShardInfo | None:
    """Write the good samples of a tar again, into a tar that the new manifest will list."""
    tar = root / shard.path
    info: ShardInfo | None = None
    if samples:
        path = change.create(shard)
        writer = ShardWriter(root / path, path=path, split=shard.split, media_of=change.media_of)
        with tar.open("rb") as file:
            for key, parts in samples.items():
                content = {}
                for extension, location in parts.items():
                    file.seek(location.offset)
                    content[extension] = file.read(location.size)
                writer.add(key, content)
        info = writer.close()
        whole = format_count(shard.samples, "sample")
        result = f"written again with {len(samples)} of its {whole}, as {path}"
    else:
        result = "it holds no good sample; removed from the manifest"
    damaged = change.retire(tar)
    change.done.append(f"{shard.path}: {result} (the old bytes: {damaged.name})")
    return info


def repair_command(root: Path, *, workers: int = 1) -> int:
    """Run `onellm shards repair`: repair a dataset and print what was done.

    Returns:
        The exit code.
    """
    if is_url(str(root)) or ":/" in str(root):
        raise UsageError(
            f"{root}: a dataset in a store is not repaired in place.",
            "a repair replaces the manifest in one step, which stores do not promise.",
            "copy the dataset to a disk, repair it there, and upload it again.",
        )
    done = repair_dataset(root, workers=workers)
    for line in done:
        write_output(line)
    left = f"see what is left: onellm shards verify {shlex.quote(str(root))}"
    write_output(
        f"{root}: {format_count(len(done), 'repair')}; {left}"
        if done
        else f"{root}: nothing to repair"
    )
    return EXIT_DONE
