"""Rows of conversations with any number of media, in the forms in which instruction data has them.

| form | media | text |
|---|---|---|
| LLaVA, M4-Instruct | `image` (a name or a list), `video`, `audio` | `conversations` |
| LLaMA-Factory, ms-swift | lists `images`, `videos`, `audios` | `messages` or `conversations` |
| OpenAI, Hugging Face | content parts, `{"type": "image", "image": "a.jpg"}` | `messages` |

Media are names of files. A film's rows may say `<image>` beside the key `video` (LLaVA's do): it is
`<video>` then. `<speech>` is `<audio>` (Ola), `<Video></Video>` is `<video>` (VideoChat2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import unquote

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.placeholders import check_placeholders
from onellm_dist.common.turns import find_conversation, get_part_modality
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.shards.format.media import make_numbered_parts
from onellm_dist.shards.format.names import parse_modalities
from onellm_dist.shards.sources.base import BadSampleError, Media
from onellm_dist.shards.sources.readers.annotations import (
    AnnotatedSample,
    AnnotationContext,
    MediaNotFetchedError,
)
from onellm_dist.shards.sources.readers.arrow_media import read_item
from onellm_dist.shards.sources.readers.conversations import (
    Turn,
    clean_turns,
    require_conversation,
)
from onellm_dist.shards.sources.readers.media_files import list_picture_names
from onellm_dist.shards.sources.readers.unread_media import (
    find_unread_column,
    is_empty,
    list_media_parts,
    list_part_modalities,
)

_ALIASES = (
    (re.compile(r"<(video|image|audio)>\s*</\1>", re.IGNORECASE), lambda m: f"<{m[1].lower()}>"),
    (re.compile(r"<speech>", re.IGNORECASE), lambda _: "<audio>"),
)
MEDIA_FIELDS = {n: (n, f"{n}s") for n in ("image", "video", "audio", "point", "imu", "fmri")}
"""Modality to the columns of its media."""
_IMAGE = "<image>"
_VIDEO = "<video>"


def parse_media_modalities(text: str) -> tuple[str, ...]:
    """Parse the option `modality` of a dataset that lists its media.

    Raises:
        UsageError: a modality is unknown, or is read from several files.
    """
    names = parse_modalities(text)
    paired = [name for name in names if len(get_modality(name).required_parts) > 1]
    if paired:
        raise UsageError(
            f"modality={text}: {', '.join(paired)} is read from several files.",
            "rows name one file for each medium.",
            "write such samples with onellm_dist.shards.format.writer.DatasetWriter.",
        )
    return names


def read_media_row(
    context: AnnotationContext,
    row: Mapping[str, Any],
    key: str,
    modalities: Sequence[str],
    meta: Mapping[str, Any],
) -> AnnotatedSample:
    """Make the sample of a row.

    Args:
        context: where the media lie.
        row: the row.
        key: the sample's key.
        modalities: those of the dataset.
        meta: what the `.json` says besides.

    Raises:
        BadSampleError: a medium is missing or of a modality that the dataset does not have, or the
            placeholders do not fit the media.
        TurnsError: the conversation cannot be used.
    """
    names = list(list_row_media(row))
    require_all_read(row, modalities, has_media=bool(names))
    if unknown := sorted({name for name, _ in names} - set(modalities)):
        raise BadSampleError(
            f"media of another modality: the row has {', '.join(unknown)} (modality="
            f"{','.join(modalities)})"
        )
    turns = clean_turns(require_conversation(row), tags=False, placeholders=True)
    media = [name for name, _ in names]
    turns = [{**turn, "value": unify_tags(turn["value"], media)} for turn in turns]
    check_tags(turns, media, modalities)
    found = [(name, find_medium(context, name, path)) for name, path in names]
    parts, listed = make_numbered_parts(found)
    return AnnotatedSample(key, parts, turns, meta={**meta, "media": listed})


def list_row_media(row: Mapping[str, Any]) -> Iterator[tuple[str, str | Mapping[str, Any]]]:
    """Yield each medium of a row, in order.

    Null, an empty text and an object of nulls, as tables have them, do not count.

    Yields:
        Its modality, and the name of its file; `{bytes, path}` where a table has the content.

    Raises:
        BadSampleError: a medium is neither the name of a file nor its content.
    """
    for name, fields in MEDIA_FIELDS.items():
        for field in fields:
            value = row.get(field)
            for item in value if isinstance(value, list) else [value]:
                if not is_empty(item):
                    yield name, _get_path(item, field)
    for kind, held in list_media_parts(find_conversation(row)):
        if held is not None:
            yield get_part_modality(kind), _get_path(held, kind)


def require_all_read(row: Mapping[str, Any], modalities: Sequence[str], *, has_media: bool) -> None:
    """Check that no other column of a row holds media.

    Args:
        row: the row.
        modalities: those of the dataset.
        has_media: whether `list_row_media` finds some.

    Raises:
        BadSampleError: one does.
    """
    read = {field for fields in MEDIA_FIELDS.values() for field in fields}
    column = find_unread_column(row, read, modalities, has_media=has_media)
    if column is not None:
        raise BadSampleError(
            f"unread media: the column {column} holds a medium; media are read from image, images, "
            "video, ... (lists, where there are several)"
        )


def require_text_alone(row: Mapping[str, Any], *more: Any) -> None:
    """Check that a row has no media, for datasets of text alone.

    Args:
        row: the row.
        more: turns besides its conversation.

    Raises:
        BadSampleError: it has some, without which its texts would be about nothing.
    """
    found = {name for name, _ in list_row_media(row)}
    for turns in (find_conversation(row), *more):
        found.update(list_part_modalities(turns))
    if found:
        media = ",".join(sorted(found))
        raise BadSampleError(
            f"media: the row has {media.replace(',', ', ')}, and the dataset is text alone "
            f"(-o modality={media} builds such rows)"
        )
    require_all_read(row, (), has_media=False)


def _get_path(item: Any, field: str) -> str | Mapping[str, Any]:
    """The name of a file that stands in a field: a text, or an object with `path` or `url`.

    Bytes are returned as `{bytes, path}`.
    """
    if isinstance(item, bytes):
        item = {"bytes": item}
    if isinstance(item, dict):
        if isinstance(item.get("bytes"), bytes):
            return item
        item = item.get("path") or item.get("url")
    if not isinstance(item, str) or not item.strip():
        raise BadSampleError(f"unreadable row: {field} is {item!r:.60}, not the name of a file")
    path = item.strip()
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    if "://" in path or path.startswith("data:"):
        raise BadSampleError(f"remote file: {path:.60} is a URL; download it first (img2dataset)")
    return path


def unify_tags(text: str, media: Sequence[str]) -> str:
    """Write placeholders as they are stored."""
    for pattern, replacement in _ALIASES:
        text = pattern.sub(replacement, text)
    if "video" in media and "image" not in media:
        text = text.replace(_IMAGE, _VIDEO)
    return text


def normalise_tags(text: str, around: str = "") -> tuple[str, int]:
    """Write placeholders of all modalities in one form, without white space around them.

    Args:
        text: the text.
        around: what replaces a placeholder and the white space; "": its tag.

    Returns:
        The text, stripped, and how many placeholders it has.
    """
    for pattern, replacement in _ALIASES:
        text = pattern.sub(replacement, text)
    text, count = _compile_tags().subn(lambda tag: around or f"<{tag[1].lower()}>", text)
    return text.strip(), count


@cache
def _compile_tags() -> re.Pattern[str]:
    return re.compile(rf"\s*<({'|'.join(map(re.escape, all_modalities()))})>\s*", re.IGNORECASE)


def check_tags(turns: Iterable[Turn], media: Sequence[str], modalities: Sequence[str]) -> None:
    """Check that the turns have one placeholder for each medium of a modality, or none.

    Raises:
        BadSampleError: they have more or fewer; the sample would be shown with wrong media.
    """
    try:
        check_placeholders("\n".join(turn["value"] for turn in turns), media, modalities)
    except SampleError as error:
        raise BadSampleError(f"placeholders: {error.what}") from error


def find_medium(
    context: AnnotationContext, name: str, path: str | Mapping[str, Any]
) -> dict[str, Media]:
    """Find a medium by the name that its row gives; Valley's films lack their extension.

    Args:
        context: where the media lie.
        name: the modality.
        path: what `list_row_media` yields.

    Raises:
        BadSampleError: it is missing, of another kind, or leads out of the folders.
    """
    accepted = next(iter(get_modality(name).required_parts.values()))
    if not isinstance(path, str):
        table = context.inputs / context.description["file"]
        return dict([read_item(path, accepted, name, table, ())])
    names = [path, *(f"{path}.{e}" for e in accepted)]
    if name == "image":  # OCR-VQA's .gif are .jpg on most users' disks
        names += list_picture_names(path)
    try:
        return context.find_media(name, *names)
    except MediaNotFetchedError:
        if path.startswith("/"):
            return context.find_media(name, path.lstrip("/"))
        raise
