"""`onellm shards build reference-lists IN OUT -o modality=NAME`: the lists of OneLLM's own code.

    *.csv, *.tsv    tab-separated, with the columns `caption` and `url` in any order
                    (pretraining, all modalities but IMU)
    *.json          a list of {id, image, conversations} (instruction tuning; `image` is the path
                    for every modality, `depth_image` or `normal_image` that of the map), or of
                    {image or url, caption}

IN is a list or a folder of lists. Paths start at `root`. Parts of them can be replaced, which turns
the authors' storage into the user's (`cluster:s3://laion=/data/laion`). A depth or normal map
without a column of its own is searched where the picture's path has `/cc3m_depth/` or
`/cc3m_normal/` for `/cc3m/`. For IMU windows use the source ego4d-imu.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.turns import CONVERSATION_KEYS, find_conversation
from onellm_dist.modalities import Modality, get_modality
from onellm_dist.shards.format.names import TEXT_ONLY, make_safe_key
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    Media,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.clouds import TensorCloud
from onellm_dist.shards.sources.readers.conversations import clean_turns
from onellm_dist.shards.sources.readers.delimited import (
    TSV,
    RowRange,
    find_row_ranges,
    read_header,
    read_rows,
)
from onellm_dist.shards.sources.readers.json_stream import read_rows as read_objects
from onellm_dist.shards.sources.readers.json_stream import split_rows
from onellm_dist.shards.sources.readers.listing import list_files
from onellm_dist.shards.sources.readers.saved_datasets import refuse_saved_dataset
from onellm_dist.shards.storage.paths import StoragePath, to_storage_path

_ROWS = 5000
_TABLES = (".csv", ".tsv", ".json")
_MEDIA_KEYS = ("image", "url")
_MAPS = ("depth", "normal")
_SPLITS = (
    ("val", re.compile(r"(?:^|[_.-])(?:val|valid|validation)(?:[_.-]|$)")),
    ("test", re.compile(r"(?:^|[_.-])test(?:[_.-]|$)")),
)


def plan(
    inputs: Path,
    *,
    seed: int,
    modality: str | None,
    root: str | None,
    replace: str | None,
    maps: str,
) -> DatasetDescription:
    """Divide the lists into ranges of rows.

    Raises:
        UsageError: no modality is named, there is no list, or one lacks a column that is needed.
    """
    if modality is None:
        raise UsageError(
            "reference-lists needs -o modality=NAME.",
            "the lists do not say what their files are.",
            "for example -o modality=image.",
        )
    if modality == "imu":
        raise UsageError(
            "reference-lists does not read IMU windows.",
            "they are cut from whole recordings.",
            "use source ego4d-imu (IN: the folder of window_idx_train.json).",
        )
    modalities = () if modality == TEXT_ONLY else (get_modality(modality).name,)
    _parse_replacements(replace)
    _parse_replacements(maps)
    refuse_saved_dataset(inputs, "onellm shards build parquet IN OUT reads it, split by split.")
    folder, tables = _list_tables(inputs)
    return DatasetDescription(
        modalities, chain.from_iterable(_make_splits(folder, t) for t in tables)
    )


def _list_tables(inputs: Path) -> tuple[Path, list[str]]:
    """The folder of the lists, and their names in it."""
    if inputs.is_file():
        return inputs.parent, [inputs.name]
    listed = list_files(inputs, recursive=True)
    found = [p.relative_to(inputs).as_posix() for p in listed.select(_TABLES)]
    if not found:
        raise UsageError(
            f"{inputs} has no {', '.join(_TABLES)}.",
            "there is nothing to build from.",
            "name the folder of the lists.",
        )
    return inputs, found


def _make_splits(folder: Path, table: str) -> Iterator[InputSplit]:
    stem = PurePosixPath(table).stem.lower()
    split = next((name for name, pattern in _SPLITS if pattern.search(stem)), "train")
    if table.lower().endswith(".json"):
        yield from split_rows(folder, table, _ROWS, split=split)
        return
    names, start = read_header(folder / table, TSV)
    if not {"caption", "url"} <= set(names):
        raise UsageError(
            f"{folder / table}: its columns are {', '.join(names)}.",
            "the reference's lists are tab-separated and have the columns caption and url.",
            "remove other tables from IN, or use source folder for them.",
        )
    for rows in find_row_ranges(folder / table, TSV, _ROWS, start):
        yield InputSplit(
            f"{table}:{rows.line}",
            {"table": table, "range": list(rows), "columns": names},
            split,
            rows.size,
        )


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    modality: str,
    root: str | None,
    replace: str | None,
    maps: str,
) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    folder = inputs.parent if inputs.is_file() else inputs
    start = to_storage_path(root) if root is not None else folder
    chosen = None if modality == TEXT_ONLY else get_modality(modality)
    for number, where, row, problem in _read_table(folder, description):
        table = PurePosixPath(description.get("table", description.get("file")))
        key = make_safe_key(f"{table.with_suffix('')}/{number:09d}")
        parts, wrong = (
            ({}, problem)
            if problem or chosen is None
            else _make_parts(
                row, chosen, start, _parse_replacements(replace), _parse_replacements(maps)
            )
        )
        yield _make_raw_sample(key, where, row, parts, wrong)


def _read_table(
    folder: Path, description: SplitDescription
) -> Iterator[tuple[int, str, Mapping[str, Any], str | None]]:
    """Yield (number, place, values, what is wrong) of each row."""
    if "columns" in description:
        table = description["table"]
        for line, values, problem in read_rows(
            folder / table, TSV, RowRange(*description["range"]), description["columns"]
        ):
            yield line, f"{table}:{line}", values, problem
        return
    for where, number, _, row in read_objects(folder, description):
        problem = (
            None
            if isinstance(row, dict)
            else f"unreadable row: a {type(row).__name__}, not an object"
        )
        yield number, where, row if problem is None else {}, problem


def _make_parts(
    row: Mapping[str, Any],
    modality: Modality,
    root: StoragePath,
    replace: Sequence[tuple[str, str]],
    maps: Sequence[tuple[str, str]],
) -> tuple[dict[str, Media], str | None]:
    """Extension to media, and what is wrong."""
    name = next((row[k] for k in _MEDIA_KEYS if row.get(k)), None)
    if not isinstance(name, str):
        return {}, "unreadable row: it names no file"
    wanted = {next(iter(modality.required_parts)): name}
    if modality.name in _MAPS:
        beside = row.get(f"{modality.name}_image") or _replace_parts(
            name, [(a, b) for a, b in maps if modality.name in b]
        )
        if not isinstance(beside, str) or beside == name:
            return {}, f"missing file: nothing says where the {modality.name} map of {name} is"
        wanted = {modality.name: beside, "image": name}
    found: dict[str, Media] = {}
    for role, path in wanted.items():
        file = _resolve_path(root, _replace_parts(path, replace))
        suffix = file.suffix.lower().lstrip(".")
        if modality.name == "point" and suffix == "pt":
            found["npy"] = TensorCloud(file, file.name)
            continue
        extension = next(
            (e for e in modality.required_parts[role] if e.endswith(f".{suffix}")),
            suffix if suffix in modality.required_parts[role] else None,
        )
        if not suffix or extension is None:
            return {}, f"unknown kind of file: {path}"
        found[extension] = file
    return found, None


def _make_raw_sample(
    key: str, where: str, row: Mapping[str, Any], parts: Mapping[str, Media], problem: str | None
) -> RawSample:
    meta = {
        k: v
        for k, v in row.items()
        if k not in ("caption", *CONVERSATION_KEYS) and v not in (None, "")
    }
    turns, caption = find_conversation(row), row.get("caption")
    if problem is None and turns is not None:
        try:
            meta["conversations"] = clean_turns(turns)
        except ValueError as error:
            problem = f"malformed conversations: {error}"
    elif problem is None and not isinstance(caption, str):
        problem = "no caption: neither a caption nor a conversation"
    return RawSample(
        key, where, parts, caption if isinstance(caption, str) else None, meta, problem
    )


def _resolve_path(root: StoragePath, path: str) -> StoragePath:
    return to_storage_path(path) if "://" in path or path.startswith("/") else root / path


def _replace_parts(path: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        path = path.replace(old, new)
    return path


def _parse_replacements(text: str | None) -> list[tuple[str, str]]:
    """Parse `A=B,C=D` into pairs.

    Raises:
        UsageError: a pair has no `=`.
    """
    pairs = []
    for pair in (text or "").split(","):
        old, equals, new = pair.partition("=")
        if pair and (not equals or not old):
            raise UsageError(
                f"{pair!r} is not OLD=NEW.",
                "it says what to replace in the lists' paths.",
                "write replace=OLD=NEW,OLD=NEW",
            )
        if pair:
            pairs.append((old, new))
    return pairs


SOURCE = Source(
    name="reference-lists",
    summary="lists of OneLLM's own code: tab-separated caption and url, or JSON with conversations",
    plan=plan,
    raw_samples=raw_samples,
    places=("root", "replace"),
    options={
        "modality": Option(
            None,
            "required: what the files are (image, video, audio, point, depth, normal, fmri, text)",
        ),
        "root": Option(
            None, "where relative paths start, a folder or a URL; default: the folder of the lists"
        ),
        "replace": Option(None, "what to replace in paths: OLD=NEW, several separated by commas"),
        "maps": Option(
            "/cc3m/=/cc3m_depth/,/cc3m/=/cc3m_normal/",
            "from the path of a picture to that of its map: OLD=NEW, NEW contains depth or normal",
        ),
    },
)
