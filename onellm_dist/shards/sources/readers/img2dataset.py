"""Tars of img2dataset 1.47 and video2dataset.

`00000.tar` lies beside `00000.parquet` (a row for each attempt) and `00000_stats.json`. Both tools
write the stats file last, so a tar without one is unfinished. img2dataset leaves failed downloads
out of the tar; video2dataset writes their `.txt` and `.json` without media. In both the column
`status` says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.hidden_files import has_hidden_part
from onellm_dist.shards.format.names import make_safe_key
from onellm_dist.shards.format.tars import (
    BLOCK,
    TAR_FAULTS,
    find_compression,
    open_tar_headers,
)
from onellm_dist.shards.format.valid_names import split_name
from onellm_dist.shards.sources.base import (
    FileRange,
    InputSplit,
    Option,
    RawSample,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.arrow_files import count_parquet_rows, read_rows
from onellm_dist.shards.sources.readers.listing import list_files

UNFINISHED = ("refuse", "skip", "take")
UNFINISHED_OPTION = Option(
    "refuse",
    "tars without _stats.json (not downloaded to the end): refuse, skip, or take what is complete "
    "in them",
)
_STATS = "_stats.json"
_SHOWN = 5

ReadText = Callable[[], str | None]
"""Reads the sample's `.txt` from the tar; None if it has none."""
ChooseCaptions = Callable[[Mapping[str, Any], ReadText], Sequence[str | None]]
"""(metadata, reader of the .txt) -> captions of a sample; [None] if there is none.

Several captions go to `.json` as a list."""


def find_tars(inputs: Path) -> list[str]:
    """Find the tars below a folder.

    Returns:
        Their names relative to the folder, sorted.

    Raises:
        UsageError: there is none.
    """
    listed = list_files(inputs, recursive=True)
    tars = sorted(p.relative_to(inputs).as_posix() for p in listed.files if p.suffix == ".tar")
    if not tars:
        packed = listed.select_compressed_tars()
        there = f", but {len(packed)} compressed: {_name_some(packed, inputs)}" if packed else ""
        raise UsageError(
            f"{inputs} has no tar{there}.",
            "there is nothing to build from.",
            "unpack them (gunzip gives .tar): samples are read by their place in the tar."
            if packed
            else "name the output folder of img2dataset or video2dataset.",
        )
    return tars


def split_tars(
    inputs: Path, tars: Sequence[str], unfinished: str
) -> tuple[Iterator[InputSplit], tuple[str, ...]]:
    """Make an input split of each tar.

    A row of the parquet is one raw sample, so its footer says how many there are.

    Args:
        inputs: the input folder.
        tars: names relative to it.
        unfinished: the option `unfinished`.

    Returns:
        The input splits, and notes for the user.

    Raises:
        UsageError: tars are unfinished or compressed and refused, the choice is unknown, or no tar
            is left.
    """
    if unfinished not in UNFINISHED:
        raise UsageError(
            f"unfinished={unfinished} is none of {', '.join(UNFINISHED)}.",
            UNFINISHED_OPTION.help + ".",
            "choose one.",
        )
    listed = list_files(inputs, recursive=True)
    _check_compressed(inputs, listed.select_compressed_tars(), unfinished)
    names = {p.relative_to(inputs).as_posix() for p in listed.files}
    complete = {n.removesuffix(_STATS) for n in names if n.endswith(_STATS)}
    parquets = {n.removesuffix(".parquet") for n in names if n.endswith(".parquet")}
    stems = [t.removesuffix(".tar") for t in tars]
    bad = [s for s in stems if s not in complete]
    named = _name_some([inputs / f"{s}.tar" for s in bad], inputs)
    if bad and unfinished == "refuse":
        raise UsageError(
            f"{inputs}: {len(bad)} of {format_count(len(stems), 'tar')} "
            f"{'is' if len(bad) == 1 else 'are'} unfinished (no {_STATS}): {named}.",
            "the download was stopped, or is still running: samples would be missing.",
            "download them to the end (incremental_mode does), or use -o unfinished=skip or "
            "-o unfinished=take.",
        )
    wanted = stems if unfinished == "take" else [s for s in stems if s in complete]
    if not wanted:
        raise UsageError(
            f"{inputs}: every tar is unfinished (no {_STATS}).",
            "nothing is left to build from.",
            "download them to the end.",
        )
    done = "left out" if unfinished == "skip" else "taken as far as they go"
    notes = [f"unfinished tars ({done}): {named}"] if bad else []
    notes += _describe_unread(names, set(stems))
    notes += listed.make_notes((".tar", ".parquet", _STATS))
    stated = [(s, s in parquets and s in complete) for s in wanted]
    return _make_splits(inputs, stated), tuple(notes)


def _describe_unread(names: Collection[str], stems: Collection[str]) -> Iterator[str]:
    """Say which samples are not read: of parquets without a tar, and of tars in capitals."""
    lonely = [n for n in names if n.endswith(".parquet") and n[: -len(".parquet")] not in stems]
    if lonely:
        yield f"parquets without their tar, whose samples are missing: {_join(sorted(lonely))}"
    capital = [n for n in names if n.lower().endswith(".tar") and not n.endswith(".tar")]
    if capital:
        yield f"not read, because only .tar is: {_join(sorted(capital))}"


def _name_some(paths: Sequence[Path], inputs: Path) -> str:
    """Name the first files of a list, relative to the input."""
    return _join([p.relative_to(inputs).as_posix() for p in paths])


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _check_compressed(inputs: Path, packed: Sequence[Path], unfinished: str) -> None:
    """Refuse compressed tars beside the others, unless they are to be skipped.

    Raises:
        UsageError: there are some.
    """
    if packed and unfinished != "skip":
        raise UsageError(
            f"{inputs}: {format_count(len(packed), 'tar is', 'tars are')} compressed: "
            f"{_name_some(packed, inputs)}.",
            "samples are read by their place in a tar, so these would be missing.",
            "unpack them (gunzip gives .tar), or leave them out: -o unfinished=skip.",
        )


def _make_splits(inputs: Path, stems: Sequence[tuple[str, bool]]) -> Iterator[InputSplit]:
    def count_rows(stem: tuple[str, bool]) -> int | None:
        return count_parquet_rows(inputs / f"{stem[0]}.parquet") if stem[1] else None

    with ThreadPoolExecutor(8) as pool:  # one request each if the input is remote
        for (stem, listed), count in zip(stems, pool.map(count_rows, stems), strict=True):
            description = {"tar": f"{stem}.tar", "parquet": f"{stem}.parquet" if listed else None}
            yield InputSplit(f"{stem}.tar", description, count=count)


def read_tar_samples(
    inputs: Path, description: SplitDescription, extensions: Sequence[str], captions: ChooseCaptions
) -> Iterator[RawSample]:
    """Read a tar's samples in the order of its parquet, or of the tar if it has none.

    Failed downloads are skipped, with their status as the reason.

    Args:
        inputs: the input folder.
        description: of the input split.
        extensions: extensions of the media, the preferred first.
        captions: chooses the captions of a sample.

    Raises:
        OneLLMError: tar and parquet are of different downloads, or the parquet cannot be read.
    """
    members, fault, hidden = list_tar_members(inputs / description["tar"])
    if description["parquet"] is None:
        rows: Iterator[tuple[dict[str, Any], str | None]] = (
            _read_row(key, parts) for key, parts in members.items()
        )
    else:
        table = inputs / description["parquet"]
        _check_pair(inputs / description["tar"], table, members)
        rows = ((_restore_key(row, members), None) for row in read_parquet_rows(table))
    if description["parquet"] is None:
        if fault is not None:  # nothing else says how many samples are lost
            yield RawSample(make_safe_key(description["tar"]), description["tar"], problem=fault)
        for name in hidden:
            where = f"{description['tar']}/{name}"
            yield RawSample(make_safe_key(where), where, skip="hidden file in a tar")
    for row, problem in rows:
        key = str(row.get("key", ""))
        parts = members.get(key)
        wrong = problem or (fault if parts is None else None)
        yield _make_raw_sample(description["tar"], key, row, parts, wrong, extensions, captions)


def _check_pair(tar: Path, table: Path, members: Mapping[str, Any]) -> None:
    """Raise OneLLMError if the tar holds samples that the parquet does not list."""
    rows = read_parquet_rows(table, ["key"])
    lost = members.keys() - {str(_restore_key(row, members).get("key")) for row in rows}
    if lost:
        raise OneLLMError(
            f"{tar} holds {format_count(len(lost), 'sample')} that {table.name} does not list, "
            f"{min(lost)} the first.",
            "the two are of different downloads, and the samples' metadata would be wrong or lost.",
            "download both again, or remove the parquet to use the .json in the tar.",
        )


def _restore_key(row: dict[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """Give a key that a program stored as a number its zeros back: 17 is `000000017` in the tar."""
    key, name = row.get("key"), next(iter(members), "")
    if isinstance(key, int) and str(key) not in members and name.isdecimal():
        return {**row, "key": str(key).zfill(len(name))}
    return row


def _make_raw_sample(
    tar: str,
    key: str,
    row: Mapping[str, Any],
    parts: Mapping[str, FileRange] | None,
    problem: str | None,
    extensions: Sequence[str],
    captions: ChooseCaptions,
) -> RawSample:
    name, where = make_safe_key(f"{tar.rpartition('/')[0]}/{key}"), f"{tar}/{key}"
    status = row.get("status")
    meta = {k: v for k, v in ((k, to_plain_json(v)) for k, v in row.items()) if v is not None}
    if status not in (None, "success"):
        return RawSample(name, where, skip=str(status))
    extension = next((e for e in extensions if parts and e in parts), None)
    if problem is None and parts is None:
        problem = "missing sample: the parquet lists it, the tar does not have it"
    elif problem is None and extension is None:
        problem = f"missing part: none of {', '.join('.' + e for e in extensions)}"
    if problem is not None or parts is None or extension is None:
        return RawSample(name, where, problem=problem)

    def read_text() -> str | None:
        text = parts.get("txt")
        return None if text is None else text.read_bytes().decode("utf-8", "surrogateescape")

    try:
        chosen = captions(row, read_text)
    except OneLLMError as error:  # a tar that ends inside the text
        return RawSample(name, where, problem=error.what)
    if len(chosen) > 1:  # which of them is read is chosen anew in each epoch
        alt_text = {"alt_text": meta["caption"]} if "caption" in meta else {}
        meta = {**meta, "caption": list(chosen), **alt_text}
        return RawSample(name, where, {extension: parts[extension]}, meta=meta)
    lost = "no caption: neither the metadata nor a .txt has one" if chosen[0] is None else None
    return RawSample(name, where, {extension: parts[extension]}, chosen[0], meta, lost)


def _read_row(key: str, parts: Mapping[str, FileRange]) -> tuple[dict[str, Any], str | None]:
    """(metadata, what is wrong) of a sample, from its `.json` in the tar."""
    if "json" not in parts:
        return {"key": key}, None
    try:
        row = json.loads(parts["json"].read_bytes())
    except ValueError as error:
        return {"key": key}, f"unreadable .json: {error}"
    except OneLLMError as error:
        return {"key": key}, error.what
    if not isinstance(row, dict):
        return {"key": key}, f"unreadable .json: a {type(row).__name__}, not an object"
    return {**row, "key": key}, None


class TarMembers(NamedTuple):
    """What a tar holds."""

    samples: dict[str, dict[str, FileRange]]
    """Key to extension to bytes."""
    fault: str | None
    """Why the tar cannot be read to its end; None: it can."""
    hidden: list[str]
    """Names of hidden files (`._cat.jpg` of macOS), which are not samples."""


def list_tar_members(tar: Path) -> TarMembers:
    """List the members of a tar; a leading `./` is not part of a name.

    Only headers are read. A tar of 10,000 samples takes about 10 MB of memory.
    """
    found = TarMembers({}, None, [])
    try:
        with tar.open("rb") as file, open_tar_headers(file) as archive:
            for member in archive:
                # type: the stubs lack the attribute. Emptied, or every header stays in memory.
                archive.members = []  # type: ignore[attr-defined]
                if member.size < 0 or archive.offset <= member.offset:
                    return found._replace(
                        fault=f"damaged tar: {tar.name} has a header of {member.size} bytes at "
                        f"offset {member.offset}"
                    )
                if not member.isreg():
                    continue
                name = member.name.removeprefix("./")
                if has_hidden_part(name):
                    found.hidden.append(name)
                elif (names := split_name(name)) is not None:
                    place = FileRange(tar, member.offset_data, member.size)
                    found.samples.setdefault(names[0], {})[names[1]] = place
            file.seek(archive.offset)
            end = file.read(BLOCK)
            # Python's tarfile (3.11) takes both for the end of the archive.
            if len(end) < BLOCK or any(end):
                return found._replace(
                    fault=f"truncated tar: {tar.name} has neither a header nor an end marker "
                    f"at offset {archive.offset}"
                )
    except TAR_FAULTS as error:
        packed = find_compression(tar)
        fault = f"truncated tar: {tar.name} cannot be read to its end ({error})"
        if packed is not None:
            fault = f"compressed tar: {tar.name} is compressed ({packed}); unpack it"
        return found._replace(fault=fault)
    return found


def read_parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Read the rows of a tar's parquet file.

    Args:
        path: the file.
        columns: the wanted columns; None: all.

    Raises:
        OneLLMError: the file or a row of it cannot be read.
    """
    try:
        for row in read_rows(path, columns=columns):
            if row.problem is not None:
                raise OneLLMError(f"{path}: {row.problem}", "", "")
            yield row.values
    except OneLLMError as error:
        raise OneLLMError(
            error.what,
            "the rows of its tar are unknown.",
            "download it again, or remove it to use the .json in the tar.",
        ) from error


def to_plain_json(value: Any) -> Any:
    """Convert a value of a parquet file to JSON: NaN becomes None, a date becomes text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): to_plain_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain_json(v) for v in value]
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


ALT_COLUMNS = ("caption", "text")
"""Columns of the alt text, in upper or lower case: img2dataset's name and LAION's (`TEXT`)."""


def find_column(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Get the first of these columns that has a value, in upper or lower case; None: none has."""
    lower = {k.lower(): v for k, v in row.items() if v is not None}
    return next((lower[n] for n in names if n in lower), None)


def choose_alt_text(row: Mapping[str, Any], text: ReadText) -> list[str | None]:
    """Choose the alt text of a picture: the column, else the tar's `.txt`."""
    found = find_column(row, ALT_COLUMNS)
    return [found if isinstance(found, str) else text()]
