"""`onellm shards index`: makes tars of others (img2dataset, video2dataset, webdataset's ShardWriter) readable as they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from onellm_dist.common.errors import OneLLMError, SampleError, UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.progress import progress
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.dataset import MANIFEST, Dataset, Manifest, ShardInfo
from onellm_dist.shards.format.energon import read_energon_splits
from onellm_dist.shards.format.index import ShardIndex, get_index_path
from onellm_dist.shards.format.index_tar import try_index_tar
from onellm_dist.shards.format.names import make_dataset_name, infer_modalities

SOURCE_NAME = "index"
"""The `source` of a manifest that was made for tars of others."""
_SPLITS = re.compile(r"(?:^|[/_.-])(train|val|validation|test)(?=[/_.-])")
_SHOWN = 5


@dataclass(frozen=True)
class IndexedShards:
    """What was indexed."""

    tars: int
    samples: int
    manifest: Path | None
    """The manifest that makes the folder a dataset; None where single tars were indexed."""
    kept: int = 0
    """Tars whose index fitted already."""


def index_existing_shards(
    path: Path,
    *,
    modalities: Sequence[str] | None = None,
    name: str | None = None,
    split: str | None = None,
    licence: str = "unknown",
    workers: int = 1,
    again: bool = True,
) -> IndexedShards:
    """Indexes one tar, or all tars below a folder; a folder gets a manifest too and is a dataset then. Tars are only read.

    A folder that has a manifest of `onellm shards build` gets its indexes again, and keeps the manifest.

    Args:
        path: a tar or a folder.
        modalities: what every sample has; inferred from the parts' extensions where None; () is text only.
        name: the dataset's name; the folder's where None.
        split: the split of all tars; where None, what Energon's `.nv-meta/split.yaml` says, else `train`, `val`, `validation`
            or `test` where a folder or the tar is named so (`val/0.tar`, `test_subj01_0.tar`), else `train`.
        licence: goes to the manifest.
        workers: processes, a tar each at a time.
        again: False: of a folder, tars are not read that have a whole index, as new as they are and for their size.

    Raises:
        UsageError: no tar there, or the modality cannot be told.
        OneLLMError: a tar cannot be indexed, or a sample lacks a part; names tar, key and offset. Indexes of whole tars stay;
            the manifest is not written.
    """
    if path.is_file():
        _index_all([path], workers=1)
        return IndexedShards(1, ShardIndex(get_index_path(path)).samples, None)
    if not path.is_dir():
        raise UsageError(
            f"{path}: there is no such file or folder.",
            "there is nothing to index.",
            "check the path.",
        )
    tars = sorted(p for p in path.rglob("*.tar") if p.is_file())
    if not tars:
        raise UsageError(
            f"{path}: there is no .tar below it.", "there is nothing to index.", "check the path."
        )
    old = _old_manifest(path)
    todo = tars if again else [t for t in tars if not _fits(t)]
    kept = len(tars) - len(todo)
    _index_all(todo, workers)
    if old is not None and old.source != SOURCE_NAME:
        _compare(path, old)
        return IndexedShards(len(tars), sum(s.samples for s in old.shards), path / MANIFEST, kept)
    manifest = _manifest(path, tars, modalities, name, split, licence)
    write_atomic(path / MANIFEST, manifest.to_bytes())
    return IndexedShards(len(tars), sum(s.samples for s in manifest.shards), path / MANIFEST, kept)


def _fits(tar: Path) -> bool:
    """The tar has an index that is whole, and was made of a file of this name and size after it was last written."""
    path = get_index_path(tar)
    try:
        index, written = ShardIndex(path), tar.stat()
        made = path.stat().st_mtime_ns
    except (OneLLMError, OSError):
        return False
    return (
        (index.tar_name, index.tar_bytes) == (tar.name, written.st_size)
        and made >= written.st_mtime_ns
        and index.is_body_intact()
    )


def _old_manifest(path: Path) -> Manifest | None:
    try:
        return Manifest.from_bytes((path / MANIFEST).read_bytes(), path / MANIFEST)
    except FileNotFoundError:
        return None


def _index_all(tars: Sequence[Path], workers: int) -> None:
    errors: list[OneLLMError] = []
    with progress(len(tars), "Indexing", unit="tars") as bar:
        if workers == 1 or len(tars) < 2:
            for tar in tars:
                errors += filter(None, [try_index_tar(tar)])
                bar.advance()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for error in pool.map(try_index_tar, tars):
                    errors += filter(None, [error])
                    bar.advance()
    if len(errors) == 1:
        raise errors[0]
    if errors:
        more = f"\nand {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise OneLLMError(
            "\n".join(e.what for e in errors[:_SHOWN]) + more,
            f"{len(errors)} of {len(tars)} tars cannot be used; no manifest was written.",
            errors[0].do,
        )


def _compare(root: Path, manifest: Manifest) -> None:
    """The new indexes against a builder's manifest.

    Raises:
        OneLLMError: a tar is not the one that was built.
    """
    dataset = Dataset(root, manifest)
    for shard in manifest.shards:
        dataset.index(shard)


def _manifest(
    root: Path,
    tars: Sequence[Path],
    modalities: Sequence[str] | None,
    name: str | None,
    split: str | None,
    licence: str,
) -> Manifest:
    shards, kinds = list[ShardInfo](), Counter[frozenset[str]]()
    example: dict[frozenset[str], tuple[Path, str, int]] = {}
    prepared = read_energon_splits(root)
    for tar in tars:
        relative = tar.relative_to(root).as_posix()
        if prepared is not None and relative not in prepared:
            continue  # Energon's split.yaml excludes it
        index = ShardIndex(get_index_path(tar))
        named = _SPLITS.search(relative)
        own = split or (
            prepared[relative] if prepared is not None else named.group(1) if named else "train"
        )
        shards.append(ShardInfo(relative, own, index.samples, index.tar_bytes, index.tar_sha256))
        for kind, (count, row) in index.extension_sets().items():
            kinds[kind] += count
            example.setdefault(kind, (tar, index.key(row), index.span(row)[0]))
    names = Counter(s.name for s in shards)
    if len(names) < len(shards):
        name_twice = names.most_common(1)[0][0]
        raise UsageError(
            f"{root}: two tars would both be the shard {name_twice!r}: {', '.join(s.path for s in shards if s.name == name_twice)}.",
            "a shard's name is part of its samples' ids.",
            "rename one of them.",
        )
    if modalities is None:
        media: Counter[frozenset[str]] = Counter()
        for kind, count in kinds.items():
            media[kind - set(TEXT_EXTENSIONS)] += count
        modalities = infer_modalities(media, root)
    for kind, count in kinds.items():
        _require(kind, count, example[kind], modalities)
    text = tuple(e for e in TEXT_EXTENSIONS if all(e in kind for kind in kinds))
    return Manifest(
        name or make_dataset_name(root), tuple(modalities), text, licence, SOURCE_NAME, tuple(shards)
    )


def _require(
    kind: frozenset[str], count: int, example: tuple[Path, str, int], modalities: Sequence[str]
) -> None:
    for modality in modalities:
        try:
            get_modality(modality).match(set(kind))
        except SampleError as error:
            tar, key, offset = example
            raise OneLLMError(
                f"{tar}, key {key}, at offset {offset}: {error.what} ({count} such sample{'s' if count > 1 else ''}).",
                f"every sample of a dataset of {', '.join(modalities)} must have its parts.",
                "leave such samples out when the tars are written, or name another modality.",
            ) from error
