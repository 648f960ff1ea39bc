"""A conversion from end to end: open, check, plan, write aside, hash, rename."""

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
from onellm_dist.common.errors import UsageError
from onellm_dist.common.progress import progress
from onellm_dist.convert.checkpoint import Opened, Options, Plan
from onellm_dist.convert.registry import DEFAULT_TARGET, WRITABLE, format_of
from onellm_dist.convert.staging import RECORD, Stage, staged
from onellm_dist.convert.tensors.writers import safetensors_header, write_tensor_file

HASH_BLOCK = 1 << 20
"""Bytes of a source that are hashed at once, always in the same memory: it stays in the processor's cache."""
SMALL_FILES = 64 << 20
"""Bytes kept for configs, tokenizer and archive headers when the disk's room is checked."""


def convert(
    source_format: str,
    source: Path,
    out: Path,
    *,
    to: str | None = None,
    options: Options | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> tuple[Opened, dict[str, Any]]:
    """Convert the checkpoint `source` into the folder `out`.

    Args:
        to: format of `out`; the usual one of the source's where None.
        workers: files written at once; 2 or the number of cores, whichever is less, where None.
        quiet: no progress.

    Returns:
        (what was read, the content of `conversion.json`).

    Raises:
        UsageError: the source does not fit, or `out` is there.
        OneLLMError: a tensor is not finite, or the disk filled up.
    """
    options = options or Options()
    target = to or DEFAULT_TARGET.get(source_format, "onellm")
    if target not in WRITABLE:
        raise UsageError(
            f"nothing writes {target!r}",
            "it is a format to read only, or unknown.",
            f"use one of: {', '.join(WRITABLE)}.",
        )
    writer = format_of(target)
    opened = format_of(source_format).open_checkpoint(source, options).checked(options)
    opened = filled(opened.as_kind(writer.KIND), options)
    plan = writer.plan(opened, options)
    record = emit(
        opened,
        plan,
        out,
        target=target,
        options=options,
        overwrite=overwrite,
        workers=workers,
        quiet=quiet,
    )
    return opened, record


def filled(opened: Opened, options: Options) -> Opened:
    """A OneLLM whose missing parameters, all of them allowed by name, are initialised (seed 0)."""
    lacking = [
        p.name
        for p in opened.problems
        if p.kind in ("missing", "mismatched") and options.allows(p.name)
    ]
    if opened.kind != "onellm" or not lacking:
        return opened
    from onellm_dist.convert.formats.onellm import onellm_shapes
    from onellm_dist.convert.new_parameters import fresh_tensors

    absent = [name for name in onellm_shapes(opened.config) if name not in opened.tensors]
    return replace(
        opened,
        tensors={**opened.tensors, **fresh_tensors(opened.config, 0, absent)},
        made=tuple(absent),
    )


def emit(
    opened: Opened,
    plan: Plan,
    out: Path,
    *,
    target: str,
    options: Options,
    overwrite: bool,
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a plan to `out`, whole or not at all, with its `conversion.json`, which is returned."""
    needs = (
        sum(file.nbytes + len(safetensors_header(file.tensors)) for file in plan.files)
        + SMALL_FILES
    )
    total = sum(file.nbytes for file in plan.files) + sum(
        path.stat().st_size for path in opened.files
    )
    mark = _fingerprint(opened, plan, target, options)
    with staged(out, overwrite=overwrite, fingerprint=mark, needs=needs) as stage:
        with progress(
            max(1, total >> 20), f"Converting to {target}", unit="MB", enabled=not quiet
        ) as bar:
            told = _Megabytes(bar.advance)
            hashes = _write_all(
                stage, plan, opened, options, told, workers or min(2, os.cpu_count() or 1)
            )
        plan.finish(stage.folder)
        record = {
            "onellm_dist": __version__,
            "from": opened.format,
            "to": target,
            "source": [
                {"file": p.name, "bytes": p.stat().st_size, "sha256": h}
                for p, h in zip(opened.files, hashes, strict=True)
            ],
            "result": [{"file": f.name, **asdict(stage.done[f.name])} for f in plan.files],
            "ignored": list(opened.ignored),
            "allowed": [str(p) for p in opened.problems],
            "initialised": list(opened.made),
            "notes": {key: value for key, value in opened.notes.items() if value is not None},
            "dtype": None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        }
        (stage.folder / RECORD).write_text(
            json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8"
        )
    return record


def _write_all(
    stage: Stage,
    plan: Plan,
    opened: Opened,
    options: Options,
    told: Callable[[int], None],
    workers: int,
) -> list[str]:
    """Write the files that are not there yet, several at once, and hash the sources beside them. Returns the sources' hashes."""
    lock, stop = threading.Lock(), threading.Event()

    def tell(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        told(count)

    def write(index: int) -> None:
        file = plan.files[index]
        if file.name in stage.done:
            told(file.nbytes)
            return
        written = write_tensor_file(
            stage.folder / file.name, file, told=tell, allow_nonfinite=options.allows
        )
        with lock:
            stage.keep(file.name, written)

    with ThreadPoolExecutor(workers + 1) as pool:
        sources = [pool.submit(_hashed, path, tell) for path in opened.files[:1]]
        files = [pool.submit(write, index) for index in range(len(plan.files))]
        sources += [pool.submit(_hashed, path, tell) for path in opened.files[1:]]
        _wait([*files, *sources], stop)
        return [future.result() for future in sources]


class _Stopped(Exception):
    """Another file failed; this one need not go on."""


def _wait(futures: list[Future[Any]], stop: threading.Event) -> None:
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    except BaseException:
        stop.set()
        raise
    failed = [
        error
        for future in done
        if (error := future.exception()) is not None and not isinstance(error, _Stopped)
    ]
    if failed:
        stop.set()
        for future in futures:
            future.cancel()
        raise failed[0]


def _hashed(path: Path, told: Callable[[int], None]) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(HASH_BLOCK))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(block):
            digest.update(block[:got])
            told(got)
    return digest.hexdigest()


def _fingerprint(opened: Opened, plan: Plan, target: str, options: Options) -> str:
    """Of everything that decides the bytes written: another one cannot take up what an earlier start left."""
    sources = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in opened.files]
    files = [(f.name, [(n, t.shape, str(t.dtype)) for n, t in f.tensors]) for f in plan.files]
    words = [
        __version__,
        opened.format,
        target,
        sources,
        files,
        str(asdict(options)),
        opened.config.to_dict(),
        dict(opened.notes),
    ]
    return hashlib.sha256(json.dumps(words, default=str, sort_keys=True).encode()).hexdigest()


class _Megabytes:
    """Counts bytes of several threads; the bar moves by whole megabytes."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._lock, self._bytes, self._shown = advance, threading.Lock(), 0, 0

    def __call__(self, count: int) -> None:
        with self._lock:
            self._bytes += count
            whole = self._bytes >> 20
            if whole > self._shown:
                self._advance(whole - self._shown)
                self._shown = whole
