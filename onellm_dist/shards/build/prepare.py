"""Prepare raw samples: read, filter and check them; or find the reason to leave them out."""

from __future__ import annotations

import errno
import hashlib
import json
import time
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.common.media_size import SampleMedium
from onellm_dist.common.placeholders import check_placeholders
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.common.turns import TurnsError, find_conversation, parse_conversations
from onellm_dist.common.workers.sandbox import decoding, is_out_of_memory
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.modalities.io.damage import collect_damage
from onellm_dist.modalities.library_faults import require_library
from onellm_dist.shards.build.descriptions import add_description, parse_description
from onellm_dist.shards.build.filters import filter_by_hash, filter_by_meta
from onellm_dist.shards.build.images import compute_dhash, get_picture_extensions, reencode_pictures
from onellm_dist.shards.build.questions import add_conversation, list_questions
from onellm_dist.shards.build.settings import BuildSettings
from onellm_dist.shards.format.media import (
    get_medium_meta,
    get_medium_parts,
    list_media,
    split_prefix,
)
from onellm_dist.shards.format.valid_names import check_names
from onellm_dist.shards.format.writer import check_parts
from onellm_dist.shards.sources.base import BadSampleError, Media, RawSample

_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
"""Categories of characters that show nothing: controls, marks of width zero, spaces."""
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
"""Errors that are the fault of the file itself; a retry does not help."""


class PreparedSample(NamedTuple):
    """A raw sample after its preparation: what is stored, or why it is left out."""

    key: str
    where: str
    """Where the user finds the sample in the input."""
    parts: dict[str, bytes] | None = None
    """Extension to content; None: the sample is left out."""
    reason: str = ""
    """Why the sample is left out."""
    skipped: bool = False
    """Whether the sample is left out knowingly, which is not a failure."""
    content_hash: bytes = bytes(16)
    """Equal media have equal hashes. It is set only if duplicates or a denylist are looked for."""
    picture_hash: int = 0
    """dHash of the picture; it is set only if near copies are looked for."""
    damage: tuple[str, ...] = ()
    """What is missing of its media, which are used all the same."""


class _SkippedError(Exception):
    """The sample is left out knowingly; the argument is the reason."""


def prepare_sample(
    raw_sample: RawSample,
    modalities: Sequence[str],
    settings: BuildSettings,
    *,
    lists_media: bool = False,
) -> PreparedSample:
    """Read a raw sample, filter it, re-encode its picture if asked, and decode its media once.

    Args:
        raw_sample: what the source listed.
        modalities: what every sample of the dataset has.
        settings: the builder's settings.
        lists_media: whether each sample lists its media; `modalities` are then what it may have.

    Raises:
        OneLLMError: the disk failed rather than the sample, or what makes the media (a model) is
            missing.
    """
    key, where = raw_sample.key, raw_sample.where
    try:
        if raw_sample.problem is not None:
            raise BadSampleError(raw_sample.problem)
        if raw_sample.skip is not None:
            raise _SkippedError(raw_sample.skip)
        return _read_sample(raw_sample, modalities, settings, lists_media)
    except _SkippedError as reason:
        return PreparedSample(key, where, reason=str(reason), skipped=True)
    except SampleError as error:
        return PreparedSample(key, where, reason=error.what)


def _read_sample(
    raw_sample: RawSample, modalities: Sequence[str], settings: BuildSettings, lists_media: bool
) -> PreparedSample:
    parts, meta = _read_texts(raw_sample)
    described = parse_description(settings.describe, tuple(modalities))
    meta = add_description(parts, meta, described)
    if questions := list_questions(settings.question, modalities):
        asked = add_conversation(raw_sample.key, meta, parts.get("txt"), questions)
        if asked is not None:
            meta = asked
            parts["json"] = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
    if (reason := filter_by_meta(meta, settings)) is not None:
        raise _SkippedError(reason)
    with collect_damage() as damage:  # a source may decode, and cut, as it reads
        for extension, media in raw_sample.parts.items():
            if extension not in parts:
                parts[extension] = _read(media)
        with decoding():
            prepared = _finish_sample(raw_sample, parts, meta, modalities, settings, lists_media)
    return prepared._replace(damage=tuple(dict.fromkeys(damage)))


def _finish_sample(
    raw_sample: RawSample,
    parts: dict[str, bytes],
    meta: Mapping[str, Any],
    modalities: Sequence[str],
    settings: BuildSettings,
    lists_media: bool,
) -> PreparedSample:
    """Hash, re-encode and check what was read."""
    content_hash, picture_hash = _hash_sample(parts, modalities, settings)
    if settings.resize is not None or settings.quality is not None:
        pictures = _find_pictures(parts, modalities)
        parts = reencode_pictures(parts, pictures, settings.resize, settings.quality)
    where = f"dataset {settings.name}, key {raw_sample.key!r}"
    check_names(where, raw_sample.key, parts)
    if lists_media:
        media = list_media(parts, meta, modalities)
    else:
        check_parts(where, (get_modality(m) for m in modalities), parts)
        media = [SampleMedium(name) for name in modalities]
    if lists_media:
        for text in _list_texts(parts, meta):
            check_placeholders(text, [medium.modality for medium in media], modalities)
    for number, medium in enumerate(media if settings.check else ()):
        _check_media(medium, parts, get_medium_meta(meta, number) if lists_media else meta)
    return PreparedSample(
        raw_sample.key,
        raw_sample.where,
        parts,
        content_hash=content_hash,
        picture_hash=picture_hash,
    )


def _list_texts(parts: Mapping[str, bytes], meta: Mapping[str, Any]) -> list[str]:
    """The texts that a sample may be read with: each caption, and its conversation."""
    caption = meta.get("caption", meta.get("captions"))
    captions = caption if isinstance(caption, list) else [caption]
    texts = [text for text in captions if isinstance(text, str)]  # others are not captions anywhere
    if "txt" in parts:
        texts = [parts["txt"].decode()]
    conversations = parse_conversations(meta, all_modalities(), placeholders=True)
    return [*texts, *("\n".join(turn.text for turn in turns) for turns in conversations)]


def _hash_sample(
    parts: Mapping[str, bytes], modalities: Sequence[str], settings: BuildSettings
) -> tuple[bytes, int]:
    """Return the hashes of a sample's media and of its picture, as far as the settings need them.

    Raises:
        _SkippedError: a medium is on the denylist.
    """
    media = {e: d for e, d in parts.items() if e not in TEXT_EXTENSIONS}
    content_hash, picture_hash = bytes(16), 0
    if settings.dedup != "none" or settings.denylist is not None:
        digests = {e: hashlib.sha256(d).hexdigest() for e, d in media.items()}
        if (reason := filter_by_hash(digests.values(), settings)) is not None:
            raise _SkippedError(reason)
        content_hash = hash_content(
            digests or {e: hashlib.sha256(d).hexdigest() for e, d in parts.items()}
        )
    if settings.dedup == "perceptual":
        pictures = _find_pictures(media, modalities)
        found = (compute_dhash(media[e], e) for e in sorted(media) if e in pictures)
        picture_hash = next(found, 0)
    return content_hash, picture_hash


def _find_pictures(parts: Collection[str], modalities: Sequence[str]) -> frozenset[str]:
    """Return the extensions of a sample's pictures, numbered ones too."""
    pictures = get_picture_extensions(modalities)
    return frozenset(pictures) | {e for e in parts if split_prefix(e)[1] in pictures}


def hash_content(digests: Mapping[str, str]) -> bytes:
    """Hash a sample's parts to 16 bytes, from the hex SHA-256 of each by extension."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).digest()[:16]


def encode_caption(data: bytes | str, where: str = "") -> bytes:
    """Make a caption as it is stored: UTF-8 without byte order mark and surrounding white space.

    Args:
        data: the caption.
        where: its file for the reason, with ": ", if it is not the place of the raw sample.

    Raises:
        BadSampleError: it is not UTF-8, has half a surrogate pair, or nothing in it can be seen.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        stored = text.strip().encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"caption is not UTF-8: {where}byte 0x{error.object[error.start]:02x} "
            f"at position {error.start}"
        ) from error
    except UnicodeEncodeError as error:
        # Tables are read with surrogateescape, so that one bad line does not damage the others.
        code = ord(error.object[error.start])
        if not 0xDC80 <= code <= 0xDCFF:
            raise BadSampleError(
                f"caption is not valid text: {where}half a surrogate pair, \\u{code:04x}, "
                f"at character {error.start}"
            ) from error
        raise BadSampleError(
            f"caption is not UTF-8: {where}byte 0x{code & 0xFF:02x} at character {error.start}"
        ) from error
    if all(unicodedata.category(character) in _INVISIBLE for character in text):
        raise BadSampleError(f"empty caption{': ' + where.rstrip(': ') if where else ''}")
    return stored


def parse_meta(data: bytes) -> dict[str, Any]:
    """Parse a sample's `.json`.

    Raises:
        BadSampleError: it is not a JSON object, or `parse_turns` refuses its conversation; an empty
            list means that there is none.
    """
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"unreadable .json: {error}") from error
    if not isinstance(meta, dict):
        raise BadSampleError(f"unreadable .json: a {type(meta).__name__}, not an object")
    try:
        parse_conversations(meta, all_modalities())
    except TurnsError as error:
        raise BadSampleError(f"malformed conversations: {error}") from error
    return meta


def _read_texts(raw_sample: RawSample) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the sample's text parts as they are stored, and its `.json` as a value."""
    parts: dict[str, bytes] = {}
    if raw_sample.caption is not None:
        parts["txt"] = encode_caption(raw_sample.caption)
    elif "txt" in raw_sample.parts:
        parts["txt"] = encode_caption(
            _read(raw_sample.parts["txt"]), f"{_get_name(raw_sample.parts['txt'])}: "
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
        elif find_conversation(meta) is None and not meta.get("questions"):  # of a benchmark
            raise BadSampleError("no caption: neither a caption nor a conversation belongs to it")
    return parts, meta


def _get_name(media: Media) -> str:
    return str(getattr(media, "member", None) or getattr(media, "name", type(media).__name__))


def _read(media: Media) -> bytes:
    """Read the bytes of a part; a fault of the disk or the network is retried.

    Raises:
        BadSampleError: the file is missing, unreadable, or not what it should be, and stays so.
        OneLLMError: the disk or the network failed several times (what is stored must not depend on
            that), or a model is missing.
    """
    for pause in (*PAUSES, None):
        try:
            return media.read_bytes()
        except (OneLLMError, MemoryError):
            raise
        except OSError as error:
            if not _is_transient(error):
                raise _make_bad_file(media, error) from error
            if pause is None:
                raise _make_disk_error(media, error) from error
            time.sleep(pause)
        except Exception as error:
            # A name with a NUL, or an archive or a tensor file that is broken in a new way.
            require_library(error)
            raise BadSampleError(
                f"unreadable file: {_get_name(media)}: {type(error).__name__}: {error}"
            ) from error
    raise AssertionError("the last try returns or raises")


def _is_transient(error: OSError) -> bool:
    """Check for a fault of the disk or the network rather than of this file.

    (Libraries raise OSErrors without a number for files that they cannot read.)
    """
    if error.errno is None:
        return isinstance(error, (TimeoutError, ConnectionError))
    return error.errno not in _LASTING


def _get_file_name(media: Media, error: OSError) -> object:
    return media if isinstance(media, Path) else error.filename or _get_name(media)


def _make_bad_file(media: Media, error: OSError) -> BadSampleError:
    name = _get_file_name(media, error)
    if isinstance(error, FileNotFoundError):
        return BadSampleError(f"missing file: {name}")
    return BadSampleError(f"unreadable file: {name}: {error.strerror or error}")


def _make_disk_error(media: Media, error: OSError) -> OneLLMError:
    return OneLLMError(
        f"{_get_file_name(media, error)}: {error.strerror or error}, {len(PAUSES) + 1} times.",
        "a sample is not left out for a fault of the disk or the network: what is built must not "
        "depend on it.",
        "build again when the disk works: finished shards are kept. A file that is lost for good "
        "is left out once it is removed.",
    )


def _check_media(medium: SampleMedium, parts: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
    """Decode one medium, and transform it as training and evaluation do."""
    name = medium.modality
    modality = get_modality(name)
    media = get_medium_parts(medium, parts)
    try:
        raw = modality.read_raw(media, meta)
        for train in (False, True):
            modality.make_value(raw, train=train, rng=np.random.default_rng(0))
    except SampleError as error:
        raise BadSampleError(f"unreadable {name}: {error.what}") from error
    except (OneLLMError, MemoryError):
        raise  # a library that does not fit, or too little memory, is not a fault of the file
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        # A decoder that fails at a strange file costs one bad sample, not the build.
        require_library(error)
        raise BadSampleError(f"unreadable {name}: {type(error).__name__}: {error}") from error
