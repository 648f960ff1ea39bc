"""From a raw_sample to the parts that are stored, or to the reason why it is left out."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.common.turns import TurnsError, parse_turns
from onellm_dist.modalities import Part, get_modality
from onellm_dist.shards.build.filters import filter_by_hash, filter_by_meta
from onellm_dist.shards.build.images import compute_dhash, reencode_pictures, get_picture_extensions
from onellm_dist.shards.build.settings import BuildSettings
from onellm_dist.shards.format.writer import check_names, check_parts
from onellm_dist.shards.sources.base import BadSampleError, Media, RawSample

PAUSES = (0.1, 0.5, 2.0)
"""Seconds before each further try to read a file."""
_LASTING = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EACCES,
        errno.EPERM,
        errno.EINVAL,
        errno.EILSEQ,
        errno.ENXIO,
        errno.ENODEV,
    }
)
"""What the system says of a file itself."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")
"""Libraries print objects with their addresses ("<_io.BytesIO object at 0x7f...>"), which differ from run to run."""


class PreparedSample(NamedTuple):
    """What became of a raw_sample."""

    key: str
    where: str
    parts: dict[str, bytes] | None = None
    """None: it is left out."""
    reason: str = ""
    skipped: bool = False
    """Left out knowingly: no failure."""
    content: bytes = bytes(16)
    """Of the media as they were read: equal media have equal ones (only where duplicates are looked for)."""
    look: int = 0
    """dHash of the picture (only where near copies are looked for)."""


class _Skipped(Exception):
    """Left out knowingly."""


def prepare(raw_sample: RawSample, modalities: Sequence[str], settings: BuildSettings) -> PreparedSample:
    """Reads a raw_sample, filters it, encodes it again where asked, and decodes its media once as training would.

    Raises:
        OneLLMError: the disk failed and not the sample, or what makes its media (a model) is missing.
    """
    try:
        if raw_sample.problem is not None:
            raise BadSampleError(raw_sample.problem)
        if raw_sample.skip is not None:
            raise _Skipped(raw_sample.skip)
        return _read_sample(raw_sample, modalities, settings)
    except _Skipped as reason:
        return PreparedSample(raw_sample.key, raw_sample.where, reason=str(reason), skipped=True)
    except SampleError as error:
        return PreparedSample(raw_sample.key, raw_sample.where, reason=_ADDRESS.sub("", error.what))


def _read_sample(raw_sample: RawSample, modalities: Sequence[str], settings: BuildSettings) -> PreparedSample:
    parts, meta = _texts(raw_sample)
    if (reason := filter_by_meta(meta, settings)) is not None:
        raise _Skipped(reason)
    for extension, media in raw_sample.parts.items():
        if extension not in parts:
            parts[extension] = _read(media)
    media_parts = {e: d for e, d in parts.items() if e not in TEXT_EXTENSIONS}
    content, look = bytes(16), 0
    pictures = get_picture_extensions(modalities)
    if settings.dedup != "none" or settings.denylist is not None:
        digests = {e: hashlib.sha256(d).hexdigest() for e, d in media_parts.items()}
        if (reason := filter_by_hash(digests.values(), settings)) is not None:
            raise _Skipped(reason)
        content = hash_content(
            digests or {e: hashlib.sha256(d).hexdigest() for e, d in parts.items()}
        )
    if settings.dedup == "perceptual":
        look = next((compute_dhash(media_parts[e]) for e in sorted(media_parts) if e in pictures), 0)
    if settings.resize is not None or settings.quality is not None:
        parts = reencode_pictures(parts, pictures, settings.resize, settings.quality)
    where = f"dataset {settings.name}, key {raw_sample.key!r}"
    check_names(where, raw_sample.key, parts)
    check_parts(where, (get_modality(m) for m in modalities), parts)
    if settings.check:
        for name in modalities:
            _check_media(name, parts, meta)
    return PreparedSample(raw_sample.key, raw_sample.where, parts, content=content, look=look)


def hash_content(digests: Mapping[str, str]) -> bytes:
    """16 bytes of a sample's parts, from their SHA-256 by extension."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).digest()[:16]


def encode_caption(data: bytes | str, where: str = "") -> bytes:
    """A caption as it is stored: UTF-8 without byte order mark and surrounding white space.

    Args:
        where: file name for the reason, where it is not the raw_sample's own.

    Raises:
        BadSampleError: not UTF-8, half a surrogate pair, or empty.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        stored = text.strip().encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"caption is not UTF-8: {where}byte 0x{error.object[error.start]:02x} at position {error.start}"
        ) from error
    except (
        UnicodeEncodeError
    ) as error:  # tables are read with surrogateescape, so that one bad line spoils no other
        code = ord(error.object[error.start])
        if not 0xDC80 <= code <= 0xDCFF:
            raise BadSampleError(
                f"caption is no text: {where}half a surrogate pair, \\u{code:04x}, at character {error.start}"
            ) from error
        raise BadSampleError(
            f"caption is not UTF-8: {where}byte 0x{code & 0xFF:02x} at character {error.start}"
        ) from error
    if not stored:
        raise BadSampleError(f"empty caption{': ' + where.rstrip(': ') if where else ''}")
    return stored


def parse_meta(data: bytes) -> dict[str, Any]:
    """A sample's `.json`.

    Raises:
        BadSampleError: not a JSON object, or `parse_turns` refuses its `conversations` (an empty list means none).
    """
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"unreadable .json: {error}") from error
    if not isinstance(meta, dict):
        raise BadSampleError(f"unreadable .json: a {type(meta).__name__}, not an object")
    conversations = meta.get("conversations")
    if conversations is not None and conversations != []:
        try:
            parse_turns(conversations)
        except TurnsError as error:
            raise BadSampleError(f"malformed conversations: {error}") from error
    return meta


def _texts(raw_sample: RawSample) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The sample's text parts as they are stored, and its `.json` as a value."""
    parts: dict[str, bytes] = {}
    if raw_sample.caption is not None:
        parts["txt"] = encode_caption(raw_sample.caption)
    elif "txt" in raw_sample.parts:
        parts["txt"] = encode_caption(
            _read(raw_sample.parts["txt"]), f"{_name(raw_sample.parts['txt'])}: "
        )
    meta: dict[str, Any] = {}
    if "json" in raw_sample.parts:
        parts["json"] = _read(raw_sample.parts["json"])
        meta = parse_meta(parts["json"])
    if raw_sample.meta:
        meta = {**meta, **raw_sample.meta}
        try:
            parts["json"] = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
        except UnicodeEncodeError as error:
            raise BadSampleError("table row is not UTF-8") from error
        parse_meta(parts["json"])
    if "txt" not in parts:
        caption = meta.get("caption", meta.get("captions"))
        captions: list[Any] = caption if isinstance(caption, list) else [caption]
        if captions and all(isinstance(one, str) for one in captions):
            for one in captions:
                encode_caption(one, ".json: ")
        elif not meta.get("conversations"):
            raise BadSampleError("no caption: neither a caption nor a conversation belongs to it")
    return parts, meta


def _name(media: Media) -> str:
    return str(getattr(media, "member", None) or getattr(media, "name", type(media).__name__))


def _read(media: Media) -> bytes:
    """The bytes of a part.

    Raises:
        BadSampleError: the file is not there, may not be read, or is not what it should be: that stays so.
        OneLLMError: the disk or the network failed, several times (what is stored must not depend on that), or a model is missing.
    """
    for pause in (*PAUSES, None):
        try:
            return media.read_bytes()
        except (OneLLMError, MemoryError):
            raise
        except OSError as error:
            if not _passing(error):
                raise _bad_file(media, error) from error
            if pause is None:
                raise _failing_disk(media, error) from error
            time.sleep(pause)
        except (
            Exception
        ) as error:  # a name with a NUL, an archive or a tensor file that is broken in a new way
            raise BadSampleError(
                f"unreadable file: {_name(media)}: {type(error).__name__}: {error}"
            ) from error
    raise AssertionError("the last try returns or raises")


def _passing(error: OSError) -> bool:
    """A fault of the disk or the network, not of this file. (Libraries raise OSErrors without a number for files that they cannot read.)"""
    if error.errno is None:
        return isinstance(error, (TimeoutError, ConnectionError))
    return error.errno not in _LASTING


def _bad_file(media: Media, error: OSError) -> BadSampleError:
    name = media if isinstance(media, Path) else error.filename or _name(media)
    if isinstance(error, FileNotFoundError):
        return BadSampleError(f"missing file: {name}")
    return BadSampleError(f"unreadable file: {name}: {error.strerror or error}")


def _failing_disk(media: Media, error: OSError) -> OneLLMError:
    name = media if isinstance(media, Path) else error.filename or _name(media)
    return OneLLMError(
        f"{name}: {error.strerror or error}, {len(PAUSES) + 1} times.",
        "a sample is not left out for a fault of the disk or the network: what is built must not depend on it.",
        "build again when it works: shards that were finished are kept. A file that is lost for good is left out when it is removed.",
    )


def _check_media(name: str, parts: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
    modality = get_modality(name)
    slots = {slot: Part(e, parts[e]) for slot, e in modality.match(set(parts)).items()}
    try:
        modality.transform(modality.decode(slots, meta), train=False, rng=np.random.default_rng(0))
    except SampleError as error:
        raise BadSampleError(f"unreadable {name}: {error.what}") from error
    except Exception as error:  # a decoder's surprise at a strange file is that file's fault: one bad sample, not a lost build
        raise BadSampleError(f"unreadable {name}: {type(error).__name__}: {error}") from error
