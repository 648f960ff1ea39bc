"""A conversion from end to end: open, check, plan, write to a staging folder, hash, rename."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from onellm_dist import __version__
from onellm_dist.common.checksums import RECORD, write_sums
from onellm_dist.common.errors import UsageError
from onellm_dist.common.progress import progress
from onellm_dist.convert.checkpoint import ConversionOptions, OpenedCheckpoint, OutputPlan
from onellm_dist.convert.integrity import check_archives, hash_file
from onellm_dist.convert.new_parameters import draw_tensors
from onellm_dist.convert.opening import open_checkpoint
from onellm_dist.convert.registry import import_format, list_formats, list_writable
from onellm_dist.convert.staging import StagingFolder, stage_output
from onellm_dist.convert.tensors.writers import build_safetensors_header, write_tensor_file

SMALL_FILES = 64 << 20
"""Bytes reserved for configs, tokenizer and archive headers when the disk's room is checked."""


def convert(
    source_format: str,
    source: Path,
    out: Path,
    *,
    to: str | None = None,
    options: ConversionOptions | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> tuple[OpenedCheckpoint, dict[str, Any]]:
    """Convert a checkpoint into a folder.

    Args:
        source_format: name of the checkpoint's format.
        source: the checkpoint.
        out: the folder to write.
        to: name of the format to write; default: the usual one of the source's format.
        options: what the user chose.
        overwrite: replace a folder that an earlier conversion wrote.
        workers: files written at once; default: 2, or the number of cores if that is less.
        quiet: show no progress.

    Returns:
        (what was read, the content of `conversion.json`).

    Raises:
        UsageError: the source does not fit, or `out` exists.
        OneLLMError: a tensor is not finite, or the disk filled up.
    """
    options = options or ConversionOptions()
    known = list_formats().get(source_format)
    target = to or (known.default_target if known is not None else "onellm")
    if target not in list_writable():
        raise UsageError(
            f"nothing writes {target!r}",
            "it can only be read, or is unknown.",
            f"use one of: {', '.join(list_writable())}.",
        )
    writer = import_format(target)
    opened = open_checkpoint(source, options, source_format).check(options)
    opened = fill_missing(opened.get_part(writer.KIND), options)
    record = write_output(
        opened,
        writer.plan_output(opened, options),
        out,
        target=target,
        options=options,
        overwrite=overwrite,
        workers=workers,
        quiet=quiet,
    )
    return opened, record


def fill_missing(opened: OpenedCheckpoint, options: ConversionOptions) -> OpenedCheckpoint:
    """Initialise the missing parameters of a OneLLM with seed 0; the user allowed them by name."""
    lacks_some = any(
        problem.kind in ("missing", "mismatched") and options.is_allowed(problem.name)
        for problem in opened.problems
    )
    if opened.kind != "onellm" or not lacks_some:
        return opened
    drawn = draw_tensors(opened.config, 0)
    absent = tuple(name for name in drawn if name not in opened.tensors)
    tensors = {**opened.tensors, **{name: drawn[name] for name in absent}}
    return replace(opened, tensors=tensors, initialised=absent)


def write_output(
    opened: OpenedCheckpoint,
    plan: OutputPlan,
    out: Path,
    *,
    target: str,
    options: ConversionOptions,
    overwrite: bool,
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a plan to a folder, completely or not at all.

    Args:
        opened: what is written.
        plan: its files.
        out: the folder to write.
        target: name of the format.
        options: what the user chose.
        overwrite: replace a folder that an earlier conversion wrote.
        workers: files written at once; default: 2, or the number of cores if that is less.
        quiet: show no progress.

    Returns:
        The content of `conversion.json`.

    Raises:
        UsageError: `out` exists, another process writes it, or the disk has too little room.
        OneLLMError: a tensor is not finite, a source is damaged, or the disk filled up.
    """
    tensor_bytes = sum(file.nbytes for file in plan.files)
    header_bytes = sum(len(build_safetensors_header(file.tensors)) for file in plan.files)
    total = tensor_bytes + sum(path.stat().st_size for path in opened.files)
    fingerprint = _compute_fingerprint(opened, plan, target, options)
    needs = tensor_bytes + header_bytes + SMALL_FILES
    with stage_output(out, overwrite=overwrite, fingerprint=fingerprint, needs=needs) as stage:
        with progress(
            max(1, total >> 20), f"Converting to {target}", unit="MB", enabled=not quiet
        ) as bar:
            counter = _MegabyteCounter(bar.advance)
            count = workers or min(2, os.cpu_count() or 1)
            hashes = _write_files(stage, plan, opened, options, counter, count)
        plan.finish(stage.folder)
        write_sums(stage.folder, {name: digest.sha256 for name, digest in stage.done.items()})
        record = _build_record(opened, plan, stage, hashes, target, options)
        text = json.dumps(record, indent=1, default=str) + "\n"
        (stage.folder / RECORD).write_text(text, encoding="utf-8")
    return record


def _build_record(
    opened: OpenedCheckpoint,
    plan: OutputPlan,
    stage: StagingFolder,
    hashes: list[str],
    target: str,
    options: ConversionOptions,
) -> dict[str, Any]:
    """The content of `conversion.json`."""
    return {
        "onellm_dist": __version__,
        "from": opened.format,
        "to": target,
        "source": [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(opened.files, hashes, strict=True)
        ],
        "result": [{"file": file.name, **asdict(stage.done[file.name])} for file in plan.files],
        "ignored": list(opened.ignored),
        "allowed": [str(problem) for problem in opened.problems],
        "initialised": list(opened.initialised),
        "notes": {key: value for key, value in opened.notes.items() if value is not None},
        "dtype": None if options.dtype is None else str(options.dtype).removeprefix("torch."),
    }


def _write_files(
    stage: StagingFolder,
    plan: OutputPlan,
    opened: OpenedCheckpoint,
    options: ConversionOptions,
    on_bytes: Callable[[int], None],
    workers: int,
) -> list[str]:
    """Write the files that are not complete yet, and hash the sources meanwhile.

    Returns:
        SHA-256 of every source.
    """
    lock, stop = threading.Lock(), threading.Event()

    def count(size: int) -> None:
        if stop.is_set():
            raise _StoppedError
        on_bytes(size)

    def write(index: int) -> None:
        file = plan.files[index]
        if file.name in stage.done:
            on_bytes(file.nbytes)
            return
        digest = write_tensor_file(
            stage.folder / file.name, file, on_bytes=count, allow_nonfinite=options.is_allowed
        )
        with lock:
            stage.keep(file.name, digest)

    with ThreadPoolExecutor(workers + 1) as pool:
        hashes = [pool.submit(hash_file, opened, path, count) for path in opened.files[:1]]
        files = [pool.submit(write, index) for index in range(len(plan.files))]
        hashes += [pool.submit(hash_file, opened, path, count) for path in opened.files[1:]]
        archives = [pool.submit(check_archives, opened.archives)]
        _wait_for([*files, *hashes, *archives], stop)
        return [future.result() for future in hashes]


class _StoppedError(Exception):
    """Another file failed, so this one need not be finished."""


def _wait_for(futures: list[Future[Any]], stop: threading.Event) -> None:
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    except BaseException:
        stop.set()
        raise
    failed = [
        error
        for future in done
        if (error := future.exception()) is not None and not isinstance(error, _StoppedError)
    ]
    if failed:
        stop.set()
        for future in futures:
            future.cancel()
        raise failed[0]


def _compute_fingerprint(
    opened: OpenedCheckpoint, plan: OutputPlan, target: str, options: ConversionOptions
) -> str:
    """Digest of everything that decides the bytes written.

    Files of an earlier start are kept only if it had the same.
    """
    sources = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in opened.files]
    files = [(f.name, [(n, t.shape, str(t.dtype)) for n, t in f.tensors]) for f in plan.files]
    content = [
        __version__,
        opened.format,
        target,
        sources,
        files,
        str(asdict(options)),
        opened.config.to_dict(),
        dict(opened.notes),
    ]
    return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()


class _MegabyteCounter:
    """Counts bytes of several threads; the bar moves by complete megabytes."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self._bytes = 0
        self._shown = 0

    def __call__(self, count: int) -> None:
        with self._lock:
            self._bytes += count
            complete = self._bytes >> 20
            if complete > self._shown:
                self._advance(complete - self._shown)
                self._shown = complete
