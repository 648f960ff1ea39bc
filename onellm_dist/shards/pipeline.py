"""From candidates to a written dataset: read, check, write in order, and keep account of what was left out.

Workers only prepare samples; one process writes them, in the order of the candidates, so the bytes on disk do not depend
on the number of workers.
"""

from __future__ import annotations

import json
import multiprocessing
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onellm_dist.errors import OneLLMError, SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.progress import progress
from onellm_dist.shards.sources.base import BadSample, Candidate, Media, Quarantined
from onellm_dist.shards.writer import DatasetWriter

_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")
"""Libraries print objects with their addresses ("<_io.BytesIO object at 0x7f...>"), which differ from run to run."""
_CHUNK = 8
"""Candidates a worker gets at once."""
_WINDOW = 4
"""Chunks in flight a worker: bounds the memory of samples that wait for their turn."""


def caption_bytes(data: bytes | str, where: str = "") -> bytes:
    """A caption as it is stored: UTF-8 without byte order mark and surrounding white space.

    Args:
        where: file name for the reason, where it is not the candidate's own.

    Raises:
        BadSample: not UTF-8, or empty.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        stored = text.strip().encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"caption is not UTF-8: {where}byte 0x{error.object[error.start]:02x} at position {error.start}") from error
    except UnicodeEncodeError as error:  # tables are read with surrogateescape, so that one bad line spoils no other
        byte = ord(error.object[error.start]) & 0xFF
        raise BadSample(f"caption is not UTF-8: {where}byte 0x{byte:02x} at character {error.start}") from error
    if not stored:
        raise BadSample(f"empty caption{': ' + where.rstrip(': ') if where else ''}")
    return stored


def parse_meta(data: bytes) -> dict[str, Any]:
    """A sample's `.json`.

    Raises:
        BadSample: not a JSON object, or a conversation that is no list of {"from", "value"}.
    """
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"unreadable .json: {error}") from error
    if not isinstance(meta, dict):
        raise BadSample(f"unreadable .json: a {type(meta).__name__}, not an object")
    turns = meta.get("conversations")
    if turns is not None and not (isinstance(turns, list) and all(_is_turn(t) for t in turns)):
        raise BadSample('malformed conversations: not a list of {"from": "human" or "gpt", "value": text}')
    return meta


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("from") in ("human", "gpt") and isinstance(turn.get("value"), str)


def _texts(candidate: Candidate) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The sample's text parts as they are stored, and its `.json` as a value."""
    parts: dict[str, bytes] = {}
    if candidate.caption is not None:
        parts["txt"] = caption_bytes(candidate.caption)
    elif "txt" in candidate.parts:
        parts["txt"] = caption_bytes(_read(candidate.parts["txt"]), f"{_name(candidate.parts['txt'])}: ")
    meta: dict[str, Any] = {}
    if "json" in candidate.parts:
        parts["json"] = _read(candidate.parts["json"])
        meta = parse_meta(parts["json"])
    if candidate.meta:
        meta = {**meta, **candidate.meta}
        try:
            parts["json"] = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
        except UnicodeEncodeError as error:
            raise BadSample("table row is not UTF-8") from error
        parse_meta(parts["json"])
    if "txt" not in parts:
        caption = meta.get("caption")
        if isinstance(caption, str):
            caption_bytes(caption, ".json: ")
        elif not meta.get("conversations"):
            raise BadSample("no caption: neither a caption nor a conversation belongs to it")
    return parts, meta


def _name(media: Media) -> str:
    return media.name if isinstance(media, Path) else str(getattr(media, "member", type(media).__name__))


def _read(media: Media) -> bytes:
    try:
        return media.read_bytes()
    except FileNotFoundError as error:
        raise BadSample(f"missing file: {media if isinstance(media, Path) else error.filename}") from error
    except OSError as error:
        raise BadSample(f"unreadable file: {media if isinstance(media, Path) else error.filename}: {error.strerror}") from error


def prepare(candidate: Candidate, modalities: Sequence[str], check: bool) -> dict[str, bytes]:
    """Reads a candidate's files and, with `check`, decodes and transforms every media once, as training would.

    Raises:
        SampleError: the reason to leave it out (`what`).
    """
    if candidate.problem is not None:
        raise BadSample(candidate.problem)
    parts, meta = _texts(candidate)
    for extension, path in candidate.parts.items():
        if extension not in parts:
            parts[extension] = _read(path)
    if check:
        for name in modalities:
            _check_media(name, parts, meta)
    return parts


def _check_media(name: str, parts: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
    modality = get_modality(name)
    slots = {slot: Part(e, parts[e]) for slot, e in modality.match(set(parts)).items()}
    try:
        modality.transform(modality.decode(slots, meta), train=False, rng=np.random.default_rng(0))
    except SampleError as error:
        raise BadSample(f"unreadable {name}: {error.what}") from error
    except Exception as error:  # a decoder's surprise at a strange file is that file's fault: one bad sample, not a lost build
        raise BadSample(f"unreadable {name}: {type(error).__name__}: {error}") from error


def _prepare_chunk(chunk: Sequence[Candidate], modalities: Sequence[str], check: bool) -> list[dict[str, bytes] | str]:
    """Parts, or the reason to leave it out, of each candidate."""
    results: list[dict[str, bytes] | str] = []
    for candidate in chunk:
        try:
            results.append(prepare(candidate, modalities, check))
        except SampleError as error:
            results.append(_ADDRESS.sub("", error.what))
    return results


def _one_thread() -> None:
    """In a worker: torch's own threads would fight over the cores that the workers share."""
    import torch

    torch.set_num_threads(1)


def _prepared(
    candidates: Iterable[Candidate], modalities: Sequence[str], check: bool, workers: int
) -> Iterator[tuple[Candidate, dict[str, bytes] | str]]:
    """Each candidate with its result, in order."""
    source = iter(candidates)
    chunks = iter(lambda: list(islice(source, _CHUNK)), [])
    if workers == 1:
        for chunk in chunks:
            yield from zip(chunk, _prepare_chunk(chunk, modalities, check), strict=True)
        return
    # spawn: forking a process that has torch's threads can hang the child.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        waiting: deque[tuple[list[Candidate], Future[list[dict[str, bytes] | str]]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_prepare_chunk, chunk, modalities, check)))
                if len(waiting) >= workers * _WINDOW:
                    first, future = waiting.popleft()
                    yield from zip(first, future.result(), strict=True)
            while waiting:
                first, future = waiting.popleft()
                yield from zip(first, future.result(), strict=True)
        except BrokenProcessPool as error:
            raise OneLLMError(
                "a builder's worker process died (killed, out of memory, or crashed in a decoder).",
                "its samples would be missing.",
                "run again with --workers 1 to see where, or with fewer workers to save memory.",
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()


def write_samples(
    writer: DatasetWriter, split: str, candidates: Sequence[Candidate], *, check: bool, workers: int, max_failures: float
) -> tuple[int, list[Quarantined]]:
    """Prepares and writes all candidates in order.

    Args:
        max_failures: the largest share of candidates that may be bad, 0 .. 1.

    Returns:
        (samples written, what was left out, in order).

    Raises:
        TooManyFailures: more than `max_failures` were bad, or all of them.
    """
    written, bad = 0, list[Quarantined]()
    results = _prepared(candidates, writer.modalities, check, workers)
    with progress(len(candidates), f"Building {writer.name}", unit="samples") as bar:
        for candidate, result in results:
            reason = result if isinstance(result, str) else _add(writer, split, candidate.key, result)
            if reason is None:
                written += 1
            else:
                bad.append(Quarantined(candidate.key, candidate.where, reason))
                bar.note(f"{len(bad)} bad")
            bar.advance()
            if len(bad) > _allowed(max_failures, len(candidates)):
                raise TooManyFailures(bad, bar.done, len(candidates), max_failures)
    if not written:
        raise TooManyFailures(bad, len(candidates), len(candidates), max_failures)
    return written, bad


def _add(writer: DatasetWriter, split: str, key: str, parts: Mapping[str, bytes]) -> str | None:
    try:
        writer.add(split, key, parts)
    except SampleError as error:
        return error.what
    return None


def _allowed(max_failures: float, total: int) -> int:
    return int(max_failures * total + 1e-9)  # 0.29 * 100 is 28.999...


class TooManyFailures(OneLLMError):
    """The build was given up; `bad` has what was found until then."""

    def __init__(self, bad: Sequence[Quarantined], seen: int, total: int, max_failures: float) -> None:
        self.bad, self.seen, self.total, self.max_failures = tuple(bad), seen, total, max_failures
        shown = "\n".join(f"  {q.file}: {q.reason}" for q in bad[:5])
        super().__init__(
            f"{len(bad)} of the first {seen} samples are bad; max_failures={max_failures:g} allows "
            f"{_allowed(max_failures, total)} of all {total}:\n{shown}" + (f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""),
            "so many failures mean a wrong input rather than a few broken files; nothing was built.",
            "repair them (listed in OUT.quarantine.jsonl), or allow more: -o max_failures=0.2",
        )

    def __reduce__(self) -> tuple[type[TooManyFailures], tuple[tuple[Quarantined, ...], int, int, float]]:  # type: ignore[override]
        return type(self), (self.bad, self.seen, self.total, self.max_failures)


def write_quarantine(path: Path, bad: Sequence[Quarantined]) -> None:
    """One JSON object a line: key, file, reason."""
    with path.open("w", encoding="ascii") as file:
        for q in bad:
            file.write(json.dumps({"key": q.key, "file": q.file, "reason": q.reason}) + "\n")
