"""`onellm shards build obelics | mmc4 IN OUT`: documents of text and pictures in order.

IN is a file or folder of JSON lines or parquet, and the pictures were downloaded beforehand (the
sets have URLs alone). A document becomes one text with `<image>` where a picture stands: with
`data.text_format=caption` the model learns it as language modelling with media.

- OBELICS, OmniCorpus: `images` and `texts` of equal length, of which one side is null; OmniCorpus'
  `valid_image` leaves pictures out. A picture is the file that the SHA-256 of its URL names
  (OmniCorpus); with `names=last` also the last part of the URL, which two pictures may share.
- MMC4: `text_list` and `image_info` ({image_name, matched_text_index}); a picture stands before its
  sentence.

Pictures of the web decay: `missing=drop` (the default) leaves a missing one out of its document,
and a document without any picture is skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.media import LISTED, make_numbered_parts
from onellm_dist.shards.format.names import make_safe_key
from onellm_dist.shards.sources.base import (
    BadSampleError,
    DatasetDescription,
    InputSplit,
    Media,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.annotations import find_media_folders
from onellm_dist.shards.sources.readers.arrow_files import ArrowPart, list_parts
from onellm_dist.shards.sources.readers.arrow_files import read_rows as read_arrow_rows
from onellm_dist.shards.sources.readers.json_stream import read_rows, split_rows
from onellm_dist.shards.sources.readers.media_files import (
    find_first_file,
    get_picture_extension,
    list_picture_names,
)
from onellm_dist.shards.sources.readers.saved_datasets import (
    SUFFIXES,
    list_dataset_files,
)
from onellm_dist.shards.sources.readers.split_names import (
    find_split,
    note_splits,
)
from onellm_dist.shards.sources.readers.text_files import JSON_SUFFIXES
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique

_ROWS = 1000
_TAG = "<image>"
_SKIPPED = "no picture of the document was fetched"


class _Piece(NamedTuple):
    """A piece of a document: a text, or the names that a picture's file may have."""

    text: str = ""
    picture: tuple[str, ...] = ()


def plan(
    inputs: Path, *, seed: int, media: Path | None, missing: str, separator: str, names: str
) -> DatasetDescription:
    """Divide the files into ranges of documents.

    Raises:
        UsageError: there is no such file, or an option is wrong.
    """
    if missing not in ("drop", "skip", "fail"):
        raise UsageError(
            f"missing={missing} is none of drop, skip, fail.",
            "it says what becomes of documents whose pictures were not fetched.",
            "choose one.",
        )
    if names not in ("hash", "last"):
        raise UsageError(
            f"names={names} is neither hash nor last.",
            "it says how the file of a picture is called.",
            "choose one.",
        )
    listed, notes = list_dataset_files(inputs)
    root = inputs if inputs.is_dir() else inputs.parent
    find_media_folders(root, media, ("images",))
    read = (*JSON_SUFFIXES, *SUFFIXES)
    files = [p.relative_to(root).as_posix() for p in listed if p.suffix.lower() in read]
    if not files:
        raise UsageError(
            f"{inputs} has no .jsonl and no .parquet.",
            "the documents are expected there.",
            "name the file, or its folder; pictures may lie elsewhere: -o media=FOLDER.",
        )
    notes += note_splits(map(PurePosixPath, files))
    stems = make_keys_unique(make_safe_key(name.rpartition(".")[0]) for name in files)
    named = not inputs.is_dir()
    splits = (
        split
        for name, stem in zip(files, stems, strict=True)
        for split in _split_file(root, name, stem, named=named)
    )
    return DatasetDescription(("image",), splits, notes, attributes=dict(LISTED))


def _split_file(root: Path, name: str, stem: str, *, named: bool) -> Iterator[InputSplit]:
    split = find_split(PurePosixPath(name))
    if PurePosixPath(name).suffix.lower() not in SUFFIXES:
        yield from split_rows(root, name, _ROWS, stem=stem, split="train" if named else split)
        return
    for part in list_parts(root / name):
        description = {"file": name, "part": list(part), "stem": stem}
        yield InputSplit(f"{name}:{part.start}", description, split, part.rows)


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    media: Path | None,
    missing: str,
    separator: str,
    names: str,
) -> Iterator[RawSample]:
    """Read the documents of one range."""
    root = inputs if inputs.is_dir() else inputs.parent
    folders = find_media_folders(root, media, ("images",))
    name, stem = description["file"], description["stem"]
    urls: dict[str, str] | None = {} if names == "last" else None
    for number, where, row, problem in _read(root, description):
        key = f"{stem}-{number:09d}"
        if problem is not None:
            yield RawSample(key, where, problem=problem)
            continue
        try:
            pieces = _list_pieces(row, urls)
            parts, text, count = _join(pieces, folders, missing, separator)
        except BadSampleError as error:
            yield RawSample(key, where, problem=error.what)
            continue
        if not count:
            yield RawSample(key, where, skip=_SKIPPED)
            continue
        numbered, listed = make_numbered_parts(parts)
        meta: dict[str, Any] = {"media": listed, "document": f"{name}[{number}]"}
        if isinstance(row.get("url"), str):
            meta["url"] = row["url"]
        yield RawSample(key, where, numbered, text, meta)


def _read(
    root: Path, description: SplitDescription
) -> Iterator[tuple[int, str, Mapping[str, Any], str | None]]:
    """Yield number, place and values of each row, and why it cannot be read."""
    if "part" in description:
        part = ArrowPart(*description["part"])
        rows = read_arrow_rows(root / description["file"], [part])
        for number, found in enumerate(rows, part.start):
            yield number, f"{description['file']}[{number}]", found.values, found.problem
        return
    for item in read_rows(root, description):
        good = isinstance(item.value, Mapping)
        row = item.value if good else {}
        yield item.number, item.where, row, None if good else "unreadable row: not a JSON object"


def _list_pieces(row: Mapping[str, Any], urls: dict[str, str] | None) -> list[_Piece]:
    """The pieces of a document, in order.

    Args:
        row: the document.
        urls: last part of the URLs seen so far to URL, where it names files; None: it does not.

    Raises:
        BadSampleError: the row has neither form, or contradicts itself.
    """
    if isinstance(row.get("image_info"), list) and isinstance(row.get("text_list"), list):
        return _list_mmc4(row["text_list"], row["image_info"], urls)
    images, texts = row.get("images"), row.get("texts")
    if not isinstance(images, list) or not isinstance(texts, list):
        raise BadSampleError("unreadable row: no images and texts, no text_list and image_info")
    if len(images) != len(texts):
        raise BadSampleError(
            f"unreadable row: {format_count(len(images), 'image')} for "
            f"{format_count(len(texts), 'text')}"
        )
    valid = row.get("valid_image")
    pictures = 0
    pieces = []
    for image, text in zip(images, texts, strict=True):
        if (image is None) == (text is None):
            raise BadSampleError("unreadable row: a piece is not exactly one of image and text")
        if image is None:
            pieces.append(_Piece(text=_require_text(text)))
            continue
        pictures += 1
        if isinstance(valid, list) and pictures <= len(valid) and not valid[pictures - 1]:
            continue
        pieces.append(_Piece(picture=_list_names(_require_text(image), urls)))
    return pieces


def _list_mmc4(
    texts: Sequence[Any], images: Sequence[Any], urls: dict[str, str] | None
) -> list[_Piece]:
    """Each picture stands before the sentence that it was matched with."""
    before: dict[int, list[tuple[str, ...]]] = {}
    for info in images:
        name = info.get("image_name") if isinstance(info, Mapping) else None
        index = info.get("matched_text_index") if isinstance(info, Mapping) else None
        if not isinstance(name, str) or type(index) is not int or not 0 <= index < len(texts):
            raise BadSampleError(
                f"unreadable row: image_info {str(info)!r:.80} for {len(texts)} sentences"
            )
        before.setdefault(index, []).append(_list_names(name, urls))
    pieces = []
    for number, text in enumerate(texts):
        pieces += [_Piece(picture=names) for names in before.get(number, ())]
        pieces.append(_Piece(text=_require_text(text)))
    return pieces


def _require_text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadSampleError(f"unreadable row: a piece is a {type(value).__name__}, not a text")
    if _TAG in value:
        raise BadSampleError(f"placeholders: a text of the document has {_TAG} of its own")
    return value


def _list_names(place: str, urls: dict[str, str] | None) -> tuple[str, ...]:
    """The names that the file of a picture may have: its own, or the SHA-256 of its URL.

    Raises:
        BadSampleError: the last part of the URL names files, and another URL has the same.
    """
    if "://" not in place:
        return list_picture_names(place)
    digest = hashlib.sha256(place.encode()).hexdigest()
    names = (*list_picture_names(f"{digest}.jpg"), digest)
    last = PurePosixPath(urlsplit(place).path).name
    if urls is None or not last or not get_picture_extension(last):
        return names
    if urls.setdefault(last, place) != place:
        raise BadSampleError(
            f"ambiguous: {last} may be the picture of {urls[last]:.90} or of {place:.90} (name "
            "files by the SHA-256 of their URLs)"
        )
    return (*names, *list_picture_names(last))


def _join(
    pieces: Sequence[_Piece], folders: Sequence[Path], missing: str, separator: str
) -> tuple[list[tuple[str, dict[str, Media]]], str, int]:
    """The pictures that are there, the text with their placeholders, and how many they are.

    Raises:
        BadSampleError: a picture is missing, or leads out of the folders.
    """
    media: list[tuple[str, dict[str, Media]]] = []
    texts: list[str] = []
    for text, names in pieces:
        if not names:
            if text.strip():
                texts.append(text.strip())
            continue
        if any(".." in PurePosixPath(name).parts for name in names):
            raise BadSampleError(f"unreadable row: the name {names[0]} leads out of the folder")
        file = find_first_file(folders, names)
        if file is None and missing == "fail":
            raise BadSampleError(f"missing file: {names[0]}")
        if file is None and missing == "skip":
            return [], "", 0
        if file is not None:
            media.append(("image", {get_picture_extension(file.name) or "jpg": file}))
            texts.append(_TAG)
    return media, separator.join(texts), len(media)


def _make_source(name: str, summary: str, licence: str) -> Source:
    return Source(
        name,
        summary,
        plan=plan,
        raw_samples=raw_samples,
        options={
            "media": Option(None, "the folder of the pictures; default: IN/images, then IN", Path),
            "missing": Option(
                "drop",
                "pictures that were not fetched: drop (the picture is left out), skip (the "
                "document is), or fail (it is a bad sample)",
            ),
            "names": Option(
                "hash",
                "names of the files of pictures with URLs: hash (the SHA-256 of the URL), or last "
                "(also the last part of the URL; of pictures that share it, one would be shown as "
                "the other, so documents with a second such URL of a range are bad samples)",
            ),
            "separator": Option("\n", "what stands between the pieces of a document"),
        },
        licence=licence,
        reads_as_stored=True,
    )


SOURCES = (
    _make_source(
        "obelics",
        "OBELICS and OmniCorpus: documents of `images` and `texts` in order, with fetched pictures",
        "OBELICS: CC BY 4.0; pictures and texts under the terms of their sites",
    ),
    _make_source(
        "mmc4",
        "MMC4: documents of `text_list` and `image_info`, with fetched pictures",
        "MMC4: ODC-BY; pictures and texts under the terms of their sites",
    ),
)
