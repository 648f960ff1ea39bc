"""The token-count cache: tokens of every text, counted once, so that plans need no tokenizer.

One file per shard and (tokenizer, text format, maximum length):
`<dataset>/token_counts/<fingerprint>/<shard>-<first 12 digits of its SHA-256>.npy`. It holds an
[n, 2] array of unsigned integers: the text tokens (BOS included) and supervised tokens of each row
(of a preference pair, those of both texts). If a row of the shard has several captions, it is an
[m, 3] array with one line per caption instead: row, text tokens, supervised tokens; rows ascend,
and a row's captions keep their order. A CRC-32 follows the array (token_count_file.py).

The texts of a dataset that lists its media are counted without their placeholders, under another
fingerprint (`get_count_fingerprint`).

A rebuilt shard or another tokenizer has another file name, so a file is never out of date. Files
are written atomically, so each is complete or absent. Beside the shards they have the permissions
of the dataset's folder. If that is read-only, or another user's token counts cannot be read, they
go to the user's cache: `<cache>/token_counts/<dataset>/<fingerprint>/`, where `<cache>` is
`$ONELLM_CACHE`, `$XDG_CACHE_HOME/onellm_dist` or `~/.cache/onellm_dist`. Ranks on several machines
must then share that folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from onellm_dist.common.errors import OneLLMError, SampleError, UsageError
from onellm_dist.common.progress import progress
from onellm_dist.common.resources import count_cpus, user_cache
from onellm_dist.data.captions import choose_captions
from onellm_dist.data.media_text import get_media_encoder
from onellm_dist.data.pair_text import encode_texts
from onellm_dist.data.retry import open_index_with_retries
from onellm_dist.data.shard_texts import open_texts
from onellm_dist.data.text import TextEncoder
from onellm_dist.data.token_count_file import (
    Counts,
    Ints,
    ShardCounts,
    load_token_counts,
    save_token_counts,
)
from onellm_dist.shards.format.dataset import Dataset, ShardInfo

UNREADABLE = (1, 0)
"""Counts of a sample whose text could not be read or does not fit the text format: it is planned
as a skipped sample of one BOS token. (Every readable text has at least two tokens.)"""
FOLDER = "token_counts"
MIN_PARALLEL_SAMPLES = 100_000
"""Fewer samples than this are counted in this process: starting others takes seconds."""
MAX_MEMORY = 256 << 20
"""Bytes of token counts that stay in memory."""
MEDIA_VERSION = 1
"""Raise it when what placeholders mean changes."""


class TokenCounts:
    """Token counts of the samples of some datasets, read from the token-count cache.

    The most recently used shards stay in memory, up to MAX_MEMORY.

    Args:
        datasets: the datasets.
        fingerprint: `TextEncoder.fingerprint`.
        split: the split that is read.
        seed: the run's seed; with sample and epoch it chooses among captions.
    """

    def __init__(
        self, datasets: Sequence[Dataset], fingerprint: str, split: str, seed: int
    ) -> None:
        self._datasets = datasets
        self._fingerprint = fingerprint
        self._seed = seed
        self._shards = [dataset.shards(split) for dataset in datasets]
        self._kept: OrderedDict[tuple[int, int], ShardCounts] = OrderedDict()
        self._bytes = 0

    def get(self, dataset: int, shard: int, rows: Ints, epochs: Ints) -> Counts:
        """Return the token counts of samples of one shard.

        Args:
            dataset: index of the dataset.
            shard: index of the shard in the dataset's split.
            rows: [k] rows of the samples.
            epochs: [k] epochs of the samples.

        Returns:
            [k, 2] text tokens and supervised tokens.

        Raises:
            OneLLMError: the shard's file is missing or damaged.
        """
        texts = self._get_shard(dataset, shard)
        if texts.starts is None:
            return np.asarray(texts.counts[rows])
        first = texts.starts[rows]
        names = self._datasets[dataset].name, self._shards[dataset][shard].name
        captions = texts.starts[rows + 1] - first
        chosen = first + choose_captions(self._seed, *names, rows, epochs, captions)
        return np.asarray(texts.counts[chosen])

    def get_texts(self, dataset: int, shard: int) -> tuple[Ints, Counts]:
        """Return the token counts of every text of a shard.

        Args:
            dataset: index of the dataset.
            shard: index of the shard in the dataset's split.

        Returns:
            [m] row of each text, and [m, 2] its text tokens and supervised tokens.

        Raises:
            OneLLMError: the shard's file is missing or damaged.
        """
        texts = self._get_shard(dataset, shard)
        if texts.starts is None:
            return np.arange(len(texts.counts), dtype=np.int64), np.asarray(texts.counts)
        rows = np.repeat(np.arange(len(texts.starts) - 1, dtype=np.int64), np.diff(texts.starts))
        return rows, np.asarray(texts.counts)

    def _get_shard(self, dataset: int, shard: int) -> ShardCounts:
        kept = self._kept.get((dataset, shard))
        if kept is not None:
            self._kept.move_to_end((dataset, shard))
            return kept
        info = self._shards[dataset][shard]
        texts = load_token_counts(
            _fetch_if_remote(self._datasets[dataset], info, self._fingerprint), info
        )
        self._kept[dataset, shard] = texts
        self._bytes += texts.nbytes
        while self._bytes > MAX_MEMORY and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return texts


def get_count_fingerprint(dataset: Dataset, fingerprint: str) -> str:
    """Return the fingerprint of a dataset's token counts: in some, placeholders are not counted."""
    if not dataset.lists_media:
        return fingerprint
    text = f"{fingerprint} media {MEDIA_VERSION} {sorted(dataset.modalities)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def get_token_count_folders(dataset: Dataset, fingerprint: str) -> tuple[Path, Path]:
    """Return the two folders that may hold token counts: the dataset's and the user cache's."""
    fingerprint = get_count_fingerprint(dataset, fingerprint)
    return (
        dataset.root / FOLDER / fingerprint,
        user_cache() / FOLDER / dataset.name / fingerprint,
    )


def get_token_count_path(dataset: Dataset, shard: ShardInfo, fingerprint: str) -> Path:
    """Return the file with a shard's token counts: where it is, or where it will be written."""
    name = _get_file_name(shard)
    beside, cached = get_token_count_folders(dataset, fingerprint)
    if _is_readable(beside) and (beside / name).exists():
        return beside / name
    if _is_readable(cached) and (cached / name).exists():
        return cached / name
    return (beside if _is_writable(beside, dataset.root) else cached) / name


def _is_readable(folder: Path) -> bool:
    """Whether a folder's files can be listed and opened; what another user keeps is absent."""
    return os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)


def _is_writable(folder: Path, root: Path) -> bool:
    """Whether files can be written into a folder below `root`, which may have to be made."""
    while folder != root and not os.path.lexists(folder):
        folder = folder.parent
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK)


def _get_file_name(shard: ShardInfo) -> str:
    return f"{shard.name}-{shard.sha256[:12]}.npy"


def _fetch_if_remote(dataset: Dataset, shard: ShardInfo, fingerprint: str) -> Path:
    """Return the path of a shard's token counts; a file stored with a remote dataset is copied."""
    path = get_token_count_path(dataset, shard, fingerprint)
    if dataset.remote is not None and not path.exists():
        # A missing file is reported by whoever opens it.
        with contextlib.suppress(FileNotFoundError):
            own = get_count_fingerprint(dataset, fingerprint)
            dataset.remote.fetch(f"{FOLDER}/{own}/{path.name}", path)
    return path


def find_missing_token_counts(
    datasets: Sequence[Dataset], fingerprint: str, split: str
) -> list[tuple[Dataset, ShardInfo]]:
    """Return the shards without token counts (two or three directory listings per dataset)."""
    missing = []
    for dataset in datasets:
        present = {
            name
            for folder in get_token_count_folders(dataset, fingerprint)
            if _is_readable(folder)
            for name in os.listdir(folder)
        }
        if dataset.remote is not None:
            own = get_count_fingerprint(dataset, fingerprint)
            present |= dataset.remote.names(f"{FOLDER}/{own}")
        missing += [
            (dataset, shard)
            for shard in dataset.shards(split)
            if _get_file_name(shard) not in present
        ]
    return missing


def build_token_counts(
    datasets: Sequence[Dataset],
    encoder: TextEncoder,
    *,
    split: str = "train",
    workers: int | None = None,
    show: bool = True,
    task: tuple[int, int] = (0, 1),
) -> int:
    """Count the tokens of all shards that have no counts yet.

    Run it on one rank while the others wait; several at once do the same work twice, but no harm.

    Args:
        datasets: the datasets.
        encoder: how texts are encoded.
        split: the split to count.
        workers: number of processes; default: one per CPU of the job, or none for few samples.
        show: whether to show progress on stderr.
        task: (i, n): only every n-th shard from the i-th on, where n processes share the work.

    Returns:
        The number of samples counted.

    Raises:
        UsageError: no sample of a shard has text in this format, or the files cannot be written.
        OneLLMError: text could not be read because of a persistent disk fault.
    """
    jobs = find_missing_token_counts(datasets, encoder.fingerprint, split)
    if task[1] > 1:
        listed = [(d.name, shard.path) for d in datasets for shard in d.shards(split)]
        own = set(listed[task[0] :: task[1]])
        jobs = [(dataset, shard) for dataset, shard in jobs if (dataset.name, shard.path) in own]
    if not jobs:
        return 0
    total = sum(shard.samples for _, shard in jobs)
    if workers is None:
        workers = 1 if total < MIN_PARALLEL_SAMPLES else min(len(jobs), count_cpus())
    with progress(total, "Counting text tokens", unit="samples", enabled=show) as bar:
        counted = (
            _count_here(jobs, encoder)
            if workers <= 1
            else _count_in_processes(jobs, encoder, workers)
        )
        for samples in counted:
            bar.advance(samples)
    return total


def _count_here(jobs: Sequence[tuple[Dataset, ShardInfo]], encoder: TextEncoder) -> Iterator[int]:
    for dataset, shard in jobs:
        yield count_shard_tokens(dataset, shard, encoder)


def _count_in_processes(
    jobs: Sequence[tuple[Dataset, ShardInfo]], encoder: TextEncoder, workers: int
) -> Iterator[int]:
    # Spawned, because this process may hold CUDA, threads and locks that a fork must not inherit.
    # Manifests and tokenizer are sent once per process: LAION-400M's are 5 MB for 41,400 shards.
    datasets = list({id(dataset): dataset for dataset, _ in jobs}.values())
    number = {id(dataset): i for i, dataset in enumerate(datasets)}
    with ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(datasets, encoder),
    ) as pool:
        futures: list[Future[int]] = [
            pool.submit(_count_in_worker, number[id(dataset)], shard) for dataset, shard in jobs
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker_arguments: list[tuple[list[Dataset], TextEncoder]] = []
"""In a worker process: the datasets it counts, and how it encodes texts."""


def _start_worker(datasets: list[Dataset], encoder: TextEncoder) -> None:
    _worker_arguments.append((datasets, encoder))


def _count_in_worker(dataset: int, shard: ShardInfo) -> int:
    datasets, encoder = _worker_arguments[0]
    return count_shard_tokens(datasets[dataset], shard, encoder)


def count_shard_tokens(dataset: Dataset, shard: ShardInfo, encoder: TextEncoder) -> int:
    """Count the tokens of one shard and write its file; `build_token_counts` has the errors.

    Returns:
        The shard's number of samples.
    """
    found: list[tuple[int, int, int]] = []
    failures: list[SampleError] = []
    with_media = get_media_encoder(encoder, dataset)
    for row, read in enumerate(open_texts(dataset, shard)):
        try:
            names = None if with_media is None else get_media_names(dataset, shard, row)
            texts = encode_texts(with_media or encoder, read(), names)
        except SampleError as error:
            if isinstance(error.__cause__, OSError):
                raise OneLLMError(
                    error.what,
                    "token counts must not depend on a disk fault, so nothing was recorded.",
                    error.do,
                ) from error
            failures.append(error)
            found.append((row, *UNREADABLE))
            continue
        found += [(row, len(ids), sum(label >= 0 for label in labels)) for ids, labels in texts]
    if len(failures) == shard.samples > 1:
        raise UsageError(
            f"dataset {dataset.name}, shard {shard.path}: none of its {shard.samples} samples has "
            f"text for data.text_format={encoder.text_format}; the first: {failures[0].what}",
            "there is nothing to train on.",
            failures[0].do,
        )
    table = np.asarray(found, dtype=np.uint32).reshape(-1, 3)
    if len(table) == shard.samples:
        table = table[:, 1:]
        if encoder.max_tokens * (2 if encoder.pairs else 1) <= np.iinfo(np.uint16).max:
            table = table.astype(np.uint16)
    path = get_token_count_path(dataset, shard, encoder.fingerprint)
    save_token_counts(path, table, dataset.root if path.is_relative_to(dataset.root) else None)
    return shard.samples


def get_media_names(dataset: Dataset, shard: ShardInfo, row: int) -> list[str]:
    """Return the modality of each medium of a sample, from the index."""
    media = open_index_with_retries(dataset, shard).media
    return [medium.modality for medium in media.get(row)] if media is not None else []
