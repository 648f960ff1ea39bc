"""Text lengths, measured once: a sidecar per shard and (tokenizer, text format, max tokens), so that plans need no tokenizer.

`<dataset>/lengths/<fingerprint>/<shard>-<sha256 of its tar, 12 digits>.npy` is an [n, 2] array of unsigned integers: text
tokens (BOS included) and supervised tokens of each row. Where a row of the shard has several captions it is an [m, 3] array
instead, a caption each: its row, text tokens, supervised tokens; rows ascending, a row's captions in their order. A rebuilt
shard or another tokenizer has another name, so a sidecar is never out of date; sidecars are written aside and renamed, so they
are whole or absent. Where the dataset's folder is read-only they lie in the user's cache instead: `$ONELLM_CACHE` (or
`$XDG_CACHE_HOME/onellm_dist`, or `~/.cache/onellm_dist`)`/lengths/<dataset>/<fingerprint>/`, which ranks on several machines must
then share.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.errors import OneLLMError, SampleError, UsageError
from onellm_dist.common.progress import progress
from onellm_dist.common.resources import user_cache
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.data.captions import chosen_captions
from onellm_dist.data.readahead import ReadAhead, Span
from onellm_dist.data.retry import index_with_retries, read_with_retries
from onellm_dist.data.text import TextEncoder
from onellm_dist.modalities.base import Part
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.index import SampleSpan, extract_parts, get_sample_span

UNREADABLE = (1, 0)
"""TokenCounts of a sample whose text could not be read or is in no such format: it will be a skipped_sample of one BOS token.

(Every readable text has at least two tokens.)"""
INLINE_SAMPLES = 100_000
"""Fewer samples than this are measured in this process: starting others takes seconds."""
CACHE_BYTES = 256 << 20
WINDOW_BYTES = 64 << 20
"""Part of a remote shard whose texts are fetched together."""

Pairs = NDArray[np.unsignedinteger]
Ints = NDArray[np.int64]


class _Row(NamedTuple):
    row: int
    place: SampleSpan
    span: Span


def token_count_folders(dataset: Dataset, fingerprint: str) -> tuple[Path, Path]:
    """Where lengths may lie for a `TextEncoder.fingerprint`: with the dataset, and in the user's cache."""
    return (
        dataset.root / "lengths" / fingerprint,
        user_cache() / "lengths" / dataset.name / fingerprint,
    )


def token_count_path(dataset: Dataset, shard: ShardInfo, fingerprint: str) -> Path:
    """The sidecar of a shard, where it lies, or where it will be written."""
    name = _sidecar_name(shard)
    beside, cached = (folder / name for folder in token_count_folders(dataset, fingerprint))
    if beside.exists() or (os.access(dataset.root, os.W_OK) and not cached.exists()):
        return beside
    return cached


def _sidecar_name(shard: ShardInfo) -> str:
    return f"{shard.name}-{shard.sha256[:12]}.npy"


class _Texts(NamedTuple):
    """The lengths of a shard's texts."""

    pairs: Pairs
    """[m, 2] text and supervised tokens of each text, row by row."""
    starts: Ints | None
    """[n + 1] the first text of each row; None where every row has one."""

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self.pairs.nbytes + (0 if self.starts is None else self.starts.nbytes)


class TokenCounts:
    """The sidecars of some datasets; the most recently used ones are kept in memory, up to CACHE_BYTES.

    Args:
        seed: the run's; with sample and epoch it chooses among captions.
    """

    def __init__(
        self, datasets: Sequence[Dataset], fingerprint: str, split: str, seed: int
    ) -> None:
        self._datasets, self._fingerprint, self._seed = datasets, fingerprint, seed
        self._shards = [dataset.shards(split) for dataset in datasets]
        self._kept: OrderedDict[tuple[int, int], _Texts] = OrderedDict()
        self._bytes = 0

    def at(self, dataset: int, shard: int, rows: Ints, epochs: Ints) -> Pairs:
        """[k, 2] text and supervised tokens of these samples of a shard ([k] rows and epochs).

        Raises:
            OneLLMError: the sidecar is missing or damaged.
        """
        texts = self._of(dataset, shard)
        if texts.starts is None:
            return texts.pairs[rows]
        first = texts.starts[rows]
        names = self._datasets[dataset].name, self._shards[dataset][shard].name
        return texts.pairs[
            first
            + chosen_captions(self._seed, *names, rows, epochs, texts.starts[rows + 1] - first)
        ]

    def _of(self, dataset: int, shard: int) -> _Texts:
        kept = self._kept.get((dataset, shard))
        if kept is not None:
            self._kept.move_to_end((dataset, shard))
            return kept
        info = self._shards[dataset][shard]
        texts = _load(_here(self._datasets[dataset], info, self._fingerprint), info)
        self._kept[dataset, shard] = texts
        self._bytes += texts.nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return texts


def _here(dataset: Dataset, shard: ShardInfo, fingerprint: str) -> Path:
    """The sidecar's path; one that lies with a remote dataset is copied first."""
    path = token_count_path(dataset, shard, fingerprint)
    if dataset.remote is not None and not path.exists():
        with contextlib.suppress(
            FileNotFoundError
        ):  # the message is that of a sidecar that is not there
            dataset.remote.fetch(f"lengths/{fingerprint}/{path.name}", path)
    return path


def _load(path: Path, shard: ShardInfo) -> _Texts:
    try:
        pairs: Pairs = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise OneLLMError(
            f"{path}: {error}",
            f"the text lengths of shard {shard.path} cannot be read.",
            "remove the file, if it is there, and start again.",
        ) from None
    if pairs.shape == (shard.samples, 2):
        return _Texts(pairs, None)
    rows = (
        pairs[:, 0].astype(np.int64)
        if pairs.ndim == 2 and pairs.shape[1] == 3
        else np.zeros(0, dtype=np.int64)
    )
    if not (np.diff(rows) >= 0).all() or not np.array_equal(
        np.unique(rows), np.arange(shard.samples)
    ):
        raise OneLLMError(
            f"{path}: it has the shape {pairs.shape}, not {(shard.samples, 2)}",
            "it is not of this shard.",
            "remove it and start again.",
        )
    # A copy: a view would keep the column of rows too.
    return _Texts(
        pairs[:, 1:].copy(), np.searchsorted(rows, np.arange(shard.samples + 1)).astype(np.int64)
    )


def missing_token_counts(
    datasets: Sequence[Dataset], fingerprint: str, split: str
) -> list[tuple[Dataset, ShardInfo]]:
    """Shards without a sidecar (two or three directory reads a dataset)."""
    missing = []
    for dataset in datasets:
        there = {
            name
            for folder in token_count_folders(dataset, fingerprint)
            if folder.is_dir()
            for name in os.listdir(folder)
        }
        if dataset.remote is not None:
            there |= dataset.remote.names(f"lengths/{fingerprint}")
        missing += [
            (dataset, shard) for shard in dataset.shards(split) if _sidecar_name(shard) not in there
        ]
    return missing


def build_token_counts(
    datasets: Sequence[Dataset],
    encoder: TextEncoder,
    *,
    split: str = "train",
    workers: int | None = None,
    show: bool = True,
) -> int:
    """Measures the shards that have no sidecar yet; returns how many samples were measured.

    Run it on one rank and let the others wait; several at once do the same work, and no harm.

    Args:
        workers: processes; every core where not given, none for few samples.
        show: a progress bar (or lines) on stderr.

    Raises:
        UsageError: no sample of a shard has text in this format; the dataset's folder cannot be written.
        OneLLMError: text could not be read for a reason that is not the sample's (a disk fault that stays).
    """
    jobs = missing_token_counts(datasets, encoder.fingerprint, split)
    if not jobs:
        return 0
    total = sum(shard.samples for _, shard in jobs)
    workers = (
        workers
        if workers is not None
        else (1 if total < INLINE_SAMPLES else min(len(jobs), os.cpu_count() or 1))
    )
    with progress(total, "Measuring text lengths", unit="sample", enabled=show) as bar:
        for samples in (
            _inline(jobs, encoder) if workers <= 1 else _parallel(jobs, encoder, workers)
        ):
            bar.advance(samples)
    return total


def _inline(jobs: Sequence[tuple[Dataset, ShardInfo]], encoder: TextEncoder) -> Iterator[int]:
    for dataset, shard in jobs:
        yield measure_shard(dataset, shard, encoder)


def _parallel(
    jobs: Sequence[tuple[Dataset, ShardInfo]], encoder: TextEncoder, workers: int
) -> Iterator[int]:
    # spawn: this process may hold CUDA, threads and locks that a fork must not inherit
    # Manifests and tokenizer travel once a process: of LAION-400M they are 5 MB, and there are 41,400 shards.
    datasets = list({id(dataset): dataset for dataset, _ in jobs}.values())
    number = {id(dataset): i for i, dataset in enumerate(datasets)}
    with ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(datasets, encoder),
    ) as pool:
        futures: list[Future[int]] = [
            pool.submit(_measure_in_worker, number[id(dataset)], shard) for dataset, shard in jobs
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_works_for: list[tuple[list[Dataset], TextEncoder]] = []
"""In a worker process: what it measures, and how."""


def _start_worker(datasets: list[Dataset], encoder: TextEncoder) -> None:
    _works_for.append((datasets, encoder))


def _measure_in_worker(dataset: int, shard: ShardInfo) -> int:
    datasets, encoder = _works_for[0]
    return measure_shard(datasets[dataset], shard, encoder)


def measure_shard(dataset: Dataset, shard: ShardInfo, encoder: TextEncoder) -> int:
    """Writes one sidecar; returns the shard's samples. See `build_token_counts` for the errors."""
    found: list[tuple[int, int, int]] = []
    failures: list[SampleError] = []
    for row, read in enumerate(_texts(dataset, shard)):
        try:
            texts = encoder.encode_all(read())
        except SampleError as error:
            if isinstance(error.__cause__, OSError):
                raise OneLLMError(
                    error.what,
                    "text lengths must not depend on a disk fault, so nothing was recorded.",
                    error.do,
                ) from error
            failures.append(error)
            found.append((row, *UNREADABLE))
            continue
        found += [(row, len(ids), sum(label >= 0 for label in labels)) for ids, labels in texts]
    if len(failures) == shard.samples > 1:
        raise UsageError(
            f"dataset {dataset.name}, shard {shard.path}: none of its {shard.samples} samples has text for data.text_format="
            f"{encoder.text_format}; the first: {failures[0].what}",
            "there is nothing to train on.",
            failures[0].do,
        )
    table = np.asarray(found, dtype=np.uint32).reshape(-1, 3)
    if len(table) == shard.samples:
        table = table[:, 1:]
        if encoder.max_tokens <= np.iinfo(np.uint16).max:
            table = table.astype(np.uint16)
    _write_aside(token_count_path(dataset, shard, encoder.fingerprint), table)
    return shard.samples


def _texts(dataset: Dataset, shard: ShardInfo) -> Iterator[Callable[[], dict[str, Part]]]:
    """What reads the text parts of each row; of a remote shard, windows of rows are fetched together, one window ahead."""
    if dataset.remote is None:
        yield from (
            partial(read_with_retries, dataset, shard, row, TEXT_EXTENSIONS)
            for row in range(shard.samples)
        )
        return
    ahead = ReadAhead(None, 2 * WINDOW_BYTES)
    windows = list(_windows(dataset, shard))
    after: list[list[_Row]] = [*windows[1:], []]
    for now, following in zip(windows, after, strict=bool(windows)):
        ahead.ask([span for _, _, span in now], [span for _, _, span in following])
        for row, place, span in now:
            yield partial(_fetched, ahead, row, place, span)


def _windows(dataset: Dataset, shard: ShardInfo) -> Iterator[list[_Row]]:
    """Neighbouring rows of a shard, as many as fill WINDOW_BYTES of the tar."""
    index_with_retries(dataset, shard)
    window: list[_Row] = []
    for row in range(shard.samples):
        place = get_sample_span(dataset, shard, row, TEXT_EXTENSIONS)
        if window and place.end - window[0][2].start > WINDOW_BYTES:
            yield window
            window = []
        window.append(_Row(row, place, Span(dataset, shard, place.start, place.end)))
    yield window


def _fetched(ahead: ReadAhead, row: int, place: SampleSpan, span: Span) -> dict[str, Part]:
    data = ahead.take(span)
    if data is not None:
        with contextlib.suppress(SampleError):
            return extract_parts(span.dataset, span.shard, row, place, data)
    return read_with_retries(span.dataset, span.shard, row, TEXT_EXTENSIONS)


def _write_aside(path: Path, pairs: Pairs) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.save(file, pairs, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(
            f"{path}: the text lengths cannot be written: {error.strerror or error}",
            "plans are made from them.",
            "make room or the folder writable; where the dataset is read-only, set ONELLM_CACHE to a folder that all ranks share.",
        ) from error
