"""`onellm shards repair`: mends what can be mended without inventing data, and leaves every good sample where it is.

| fault | what is done |
|---|---|
| lost, damaged or stale index | made again from the tar |
| a sample with a part that fails its CRC-32, a sample cut off by the tar's end, a damaged header | the tar is written again without it |
| a key that stands twice (in one tar, or in two) | the first stays |
| a sample without the parts of the dataset's modalities | left out |
| a tar that the manifest lists and that is not there, or that holds nothing good any more | leaves the manifest |
| files of a stopped writer | removed |

A tar that is written again keeps its old bytes beside it as `NAME.tar.damaged` until the user removes them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import EXIT_DONE, OneLLMError, SampleError
from onellm_dist.common.files import STAGED, write_atomic
from onellm_dist.common.progress import progress
from onellm_dist.modalities import get_modality
from onellm_dist.shards.build.finish import format_quarantine
from onellm_dist.shards.format.dataset import (
    MANIFEST,
    SHARD_FOLDER,
    Manifest,
    ShardInfo,
    explain_missing_dataset,
)
from onellm_dist.shards.format.energon import META, write_energon
from onellm_dist.shards.format.index import PartLocation, ShardIndex, get_index_path
from onellm_dist.shards.format.index_tar import index_tar
from onellm_dist.shards.format.tar_writer import ShardWriter
from onellm_dist.shards.format.tars import salvage_tar, sha256_file
from onellm_dist.shards.sources.base import QuarantinedSample
from onellm_dist.shards.tools.repeated_keys import RepeatedKeyFinder, hash_keys

DAMAGED = ".damaged"
REPAIRED = "repaired.jsonl"
"""Samples that a repair left out, with reasons (added to by every repair)."""


def repair_dataset(root: Path, *, workers: int = 1) -> list[str]:
    """Repairs a dataset in place.

    Args:
        root: the dataset's folder.
        workers: processes that look for faults, a shard each at a time; one process mends.

    Returns:
        What was done, a line each; empty: there was nothing to do.

    Raises:
        UsageError: there is no dataset.
        OneLLMError: no good sample is left; nothing was changed then.
    """
    try:
        manifest = Manifest.from_bytes((root / MANIFEST).read_bytes(), root / MANIFEST)
    except OSError as error:
        raise explain_missing_dataset(root) from error
    done, lost, shards = list[str](), list[QuarantinedSample](), list[ShardInfo]()
    whole, repeated = _surveyed(root, manifest, workers)
    for number, shard in enumerate(manifest.shards):
        mended = _mended(root, manifest, shard, whole[number], repeated.get(number, {}), done, lost)
        shards += [mended] if mended is not None else []
    if not shards:
        raise OneLLMError(
            f"{root}: no good sample is left.",
            "an empty dataset cannot be read.",
            "restore the tars, or build again.",
        )
    for path in (
        sorted((root / SHARD_FOLDER).glob(f"*{STAGED}")) if (root / SHARD_FOLDER).is_dir() else []
    ):
        path.unlink()
        done.append(f"{path.relative_to(root)}: left over from a writer that was stopped; removed")
    if lost:
        old = (root / REPAIRED).read_bytes() if (root / REPAIRED).exists() else b""
        write_atomic(root / REPAIRED, old + format_quarantine(lost))
    if tuple(shards) != manifest.shards:
        write_atomic(root / MANIFEST, replace(manifest, shards=tuple(shards)).to_bytes())
    if done and (root / META).is_dir():
        write_energon(root)
    return done


def _surveyed(
    root: Path, manifest: Manifest, workers: int
) -> tuple[list[bool], dict[int, dict[int, str]]]:
    """(which tars are whole, by the manifest's SHA-256; shard -> row -> the earlier shard with a good sample of the same key).

    Every byte is read once here. Memory does not grow with the number of samples (`KeyBook`).
    """
    whole, repeated = list[bool](), dict[int, dict[int, str]]()
    with RepeatedKeyFinder(sum(s.samples for s in manifest.shards)) as book:
        with progress(
            len(manifest.shards), f"Looking through {manifest.name}", unit="shards"
        ) as bar:
            for number, (is_whole, hashes, rows) in enumerate(
                _each_survey(root, manifest, workers)
            ):
                whole.append(is_whole)
                book.add(number, hashes, rows)
                bar.advance()
        for first, later in book.repeats():
            repeated.setdefault(later.shard, {})[later.row] = manifest.shards[first.shard].path
    return whole, repeated


_Survey = tuple[bool, NDArray[np.uint64], list[int]]
"""Whether the tar is whole; [n, 2] hashes of the keys of its good samples; their rows."""


def _each_survey(root: Path, manifest: Manifest, workers: int) -> Iterator[_Survey]:
    slim = replace(manifest, shards=(), attributes={})  # it travels with every shard
    if workers == 1:
        yield from (_survey(root, slim, shard) for shard in manifest.shards)
        return
    count = len(manifest.shards)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_survey, [root] * count, [slim] * count, manifest.shards)


def _survey(root: Path, manifest: Manifest, shard: ShardInfo) -> _Survey:
    tar = root / shard.path
    there = tar.is_file()
    whole = there and sha256_file(tar) == shard.sha256
    found = enumerate(_samples(tar, _trusted_index(tar, shard), whole)) if there else ()
    good = [
        (row, key)
        for row, (key, parts, fault) in found
        if fault is None and _lacking(manifest, parts) is None
    ]
    return whole, hash_keys([key for _, key in good]), [row for row, _ in good]


def _mended(
    root: Path,
    manifest: Manifest,
    shard: ShardInfo,
    whole: bool,
    repeated: Mapping[int, str],
    done: list[str],
    lost: list[QuarantinedSample],
) -> ShardInfo | None:
    """The shard as it is after its repair; None: nothing of it is there."""
    tar = root / shard.path
    if not tar.is_file():
        done.append(f"{shard.path}: missing; taken from the manifest ({shard.samples} samples)")
        return None
    index = _index_of(tar)
    samples = dict[str, dict[str, PartLocation]]()
    order, faults = list[str](), list[QuarantinedSample]()
    for row, (key, parts, fault) in enumerate(_samples(tar, _trusted_index(tar, shard), whole)):
        reason = fault or _lacking(manifest, parts)
        if reason is None and row in repeated:
            reason = f"duplicate key: it stands in {repeated[row]}"
        if reason is None:
            samples[key] = parts
            order.append(key)
        else:
            faults.append(QuarantinedSample(key, shard.path, reason))
    if not faults and not whole and salvage_tar(tar)[1] is None:
        index_tar(tar)  # headers or padding changed, or it is another tar: every sample is good
        info = ShardInfo(shard.path, shard.split, len(order), tar.stat().st_size, sha256_file(tar))
        done.append(
            f"{shard.path}: taken as it is now ({info.samples} samples, {shard.samples} before); index and manifest say so"
        )
        return info
    if not faults and whole:
        if (
            index is None
            or not index.is_body_intact()
            or index.tar_sha256 != shard.sha256
            or index.samples != len(order)
        ):
            index_tar(tar)
            done.append(f"{shard.path}: index made again")
        return shard
    lost += faults
    done += [f"{shard.path}, key {q.key}: {q.reason}; left out" for q in faults]
    return _rewritten(root, shard, {k: samples[k] for k in order}, done)


def _index_of(tar: Path) -> ShardIndex | None:
    try:
        index = ShardIndex(get_index_path(tar))
    except (OSError, OneLLMError):
        return None
    return index if index.is_body_intact() else None


def _trusted_index(tar: Path, shard: ShardInfo) -> ShardIndex | None:
    """The index where it tells where this tar's samples lie."""
    index = _index_of(tar)
    return index if index is not None and _is_of(index, shard, tar) else None


def _is_of(index: ShardIndex, shard: ShardInfo, tar: Path) -> bool:
    """The index tells where this tar's samples lie: it is the manifest's, and the tar is not another whole one of other length."""
    if index.tar_sha256 != shard.sha256:
        return False
    return tar.stat().st_size == shard.bytes or salvage_tar(tar)[1] is not None


def _samples(
    tar: Path, index: ShardIndex | None, whole: bool
) -> Iterator[tuple[str, dict[str, PartLocation], str | None]]:
    """Every sample that there is a trace of: key, parts, and what is wrong with it.

    A usable index knows samples behind a damaged header, and the checksums; without one the tar tells as far as it can be read.
    """
    if index is None:
        rows, how = salvage_tar(tar)
        for key, parts in zip(rows.keys, rows.parts, strict=True):
            yield key, parts, None
        if how is not None:
            yield (
                f"(behind {rows.keys[-1]})" if rows.keys else "(all)",
                {},
                f"unreadable tar: {how}",
            )
        return
    with tar.open("rb") as file:
        for row in range(index.samples):
            parts = index.parts(row)
            fault = None
            for extension, place in parts.items() if not whole else ():
                file.seek(place.offset)
                if zlib.crc32(file.read(place.size)) != place.crc32:
                    fault = f"damaged part: .{extension} at offset {place.offset} fails its CRC-32"
            yield index.key(row), parts, fault


def _lacking(manifest: Manifest, parts: Mapping[str, PartLocation]) -> str | None:
    for name in manifest.modalities:
        try:
            get_modality(name).match(set(parts))
        except SampleError as error:
            return f"missing part: {error.what}"
    missing = [e for e in manifest.text if e not in parts]
    return f"missing part: .{missing[0]}" if missing else None


def _rewritten(
    root: Path, shard: ShardInfo, samples: Mapping[str, Mapping[str, PartLocation]], done: list[str]
) -> ShardInfo | None:
    """Writes the tar again from its good samples; the old one stays beside it."""
    tar = root / shard.path
    damaged = tar.with_name(tar.name + DAMAGED)
    info: ShardInfo | None = None
    if samples:
        writer = ShardWriter(tar, path=shard.path, split=shard.split)
        with tar.open("rb") as file:
            for key, parts in samples.items():
                content = {}
                for extension, place in parts.items():
                    file.seek(place.offset)
                    content[extension] = file.read(place.size)
                writer.add(key, content)
        damaged.unlink(missing_ok=True)
        damaged.hardlink_to(tar)
        info = writer.close()
    else:
        tar.replace(damaged)
        get_index_path(tar).unlink(missing_ok=True)
    kept = (
        f"written again with {len(samples)} of its {shard.samples} samples"
        if samples
        else "nothing good in it; taken from the manifest"
    )
    done.append(f"{shard.path}: {kept} (the old bytes: {damaged.name})")
    return info


def repair_command(root: Path, *, workers: int = 1) -> int:
    """`onellm shards repair`: prints what was done. Returns the exit code."""
    done = repair_dataset(root, workers=workers)
    for line in done:
        print(line)
    print(
        f"{root}: {len(done)} repairs; see what is left: onellm shards verify {root}"
        if done
        else f"{root}: nothing to repair"
    )
    return EXIT_DONE
