"""`onellm shards build wavcaps IN OUT`: WavCaps in the folders of its repository on the Hub.

    json_files/<source>/*.json                      {"data": [{id, caption, ...}]}
    json_files/blacklist/blacklist_exclude_*.json   {"AudioSet": [ids], "FreeSound": [ids]}
    Zip_files/<source>/<source>.z01, ..., .zip      split archives, read where they lie, and/or
    <folder with the source's name>/<id>.flac       the unpacked files

Sources are AudioSet_SL, BBC_Sound_Effects, FreeSound and SoundBible. AudioSet's ids have a leading
`Y` and the suffix `.wav`; files are found with and without them. Fields that only some sources have
go to `.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.format.names import make_safe_key
from onellm_dist.shards.sources.base import (
    DatasetDescription,
    InputSplit,
    Option,
    RawSample,
    Source,
    SplitDescription,
)
from onellm_dist.shards.sources.readers.json_stream import read_rows, split_rows
from onellm_dist.shards.sources.readers.listing import list_files
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.pool import MediaPool, find_media, find_pool

SOURCES = ("AudioSet_SL", "BBC_Sound_Effects", "FreeSound", "SoundBible")
SUFFIXES = (".flac", ".wav")
_JSON = "json_files"
_ROWS = 2000
_ENDINGS = (".wav", ".flac", ".mp3")
_YOUTUBE = 11
"""Length of a YouTube id."""


def plan(
    inputs: Path, *, seed: int, blacklist: str | None, sources: str | None, missing: str
) -> DatasetDescription:
    """Divide the JSON of each source into ranges of rows.

    Raises:
        UsageError: a source has no JSON or no audio, a source is unknown, or there is no such
            blacklist.
    """
    check_missing(missing)
    wanted = SOURCES if sources is None else tuple(s.strip() for s in sources.split(","))
    if not set(wanted) <= set(SOURCES):
        raise UsageError(
            f"sources={sources}: one of them is not among {', '.join(SOURCES)}.",
            "it is not in WavCaps.",
            "correct it.",
        )
    if blacklist is not None:
        _load_blacklist(inputs, blacklist)
    tables = {name: _list_tables(inputs, name) for name in wanted}
    if not any(tables.values()):
        raise UsageError(
            f"{inputs / _JSON} has no JSON of {', '.join(wanted)}.",
            "there are no captions.",
            "name the folder that contains json_files/.",
        )
    pool, pools = find_pool(inputs, SUFFIXES), dict[str, MediaPool]()
    for name, found in tables.items():
        pools[name] = pool.filter_by_name(name)
        if found and not pools[name]:
            raise UsageError(
                f"{inputs}: there is {found[0]}, but no folder of .flac and no .zip has {name} "
                f"in its path.",
                "captions have no audio.",
                f"download Zip_files/{name}, or leave the source out: "
                f"-o sources={','.join(s for s in wanted if s != name)}",
            )
    notes = tuple(
        f"no {_JSON}/{name}: this source is left out" for name, found in tables.items() if not found
    )
    if blacklist is None:
        notes += (
            "no blacklist: clips of AudioCaps' and Clotho's test sets may be among the samples",
        )
    splits = chain.from_iterable(
        _make_splits(inputs, name, table, pools[name])
        for name, found in tables.items()
        for table in found
    )
    return DatasetDescription(("audio",), splits, notes, {"blacklist": blacklist})


def _list_tables(inputs: Path, name: str) -> list[str]:
    """The JSON files of a source.

    `x_2s.json` (clips of 2 s and more) is left out if there is `x.json`, which has all clips.
    """
    folder = inputs / _JSON / name
    listed = list_files(folder).select((".json",)) if folder.is_dir() else []
    found = [p.relative_to(inputs).as_posix() for p in listed]
    return [
        f
        for f in found
        if f.replace("_2s.json", ".json") not in found or not f.endswith("_2s.json")
    ]


def _make_splits(inputs: Path, name: str, table: str, pool: MediaPool) -> Iterator[InputSplit]:
    with (inputs / table).open("rb") as file:
        # The first version of the dataset has the list alone.
        is_list = file.read(100).lstrip(b"\xef\xbb\xbf \r\n").startswith(b"[")
    key = None if is_list else "data"
    yield from split_rows(inputs, table, _ROWS, key=key, source=name, pool=pool.to_json())


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    blacklist: str | None,
    sources: str | None,
    missing: str,
) -> Iterator[RawSample]:
    """Read the samples of one range of rows."""
    pool, name = MediaPool.from_json(description["pool"]), description["source"]
    listed = (
        _load_blacklist(inputs, blacklist).get(name.removesuffix("_SL"), frozenset())
        if blacklist
        else frozenset()
    )
    for where, number, _, row in read_rows(inputs, description):
        identity = row.get("id") if isinstance(row, dict) else None
        if not isinstance(identity, (str, int)) or not str(identity).strip():
            yield RawSample(f"{name}/row-{number:09d}", where, problem="unreadable row: no id")
            continue
        stems = _list_stems(name, str(identity))
        key = make_safe_key(f"{name}/{stems[0]}")
        if not listed.isdisjoint(stems):
            yield RawSample(key, where, skip="blacklist")
            continue
        found = find_media(inputs, pool, stems, SUFFIXES)
        if found is None:
            lost = f"missing file: {stems[0]}.flac is in no folder and no archive of {name}"
            yield (
                RawSample(key, where, problem=lost)
                if missing == "fail"
                else RawSample(key, where, skip="media was not fetched")
            )
            continue
        caption = row.get("caption", row.get("caption_1"))
        problem = None if isinstance(caption, str) else "no caption: the row has none"
        yield RawSample(
            key, where, {found[0][1:]: found[1]}, caption, {**row, "source": name}, problem
        )


def _list_stems(source: str, identity: str) -> tuple[str, ...]:
    """Names that the file of an id may have, its own first."""
    stem = next((identity[: -len(e)] for e in _ENDINGS if identity.lower().endswith(e)), identity)
    if source.startswith("AudioSet"):
        if len(stem) == _YOUTUBE:
            return stem, f"Y{stem}"
        if len(stem) == _YOUTUBE + 1 and stem[0] == "Y":
            return stem, stem[1:]
    return (stem,)


@lru_cache(maxsize=2)
def _load_blacklist(inputs: Path, name: str) -> Mapping[str, frozenset[str]]:
    """Source (`AudioSet`, `FreeSound`) to the stems that are left out.

    Raises:
        UsageError: there is no such file, or it is not a blacklist.
    """
    path = inputs / name
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: {error}",
            "samples of evaluation sets would be trained on.",
            "check the option blacklist (relative to IN).",
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise UsageError(
            f"{path} is not an object of lists.",
            "it is not a blacklist of WavCaps.",
            "use one of json_files/blacklist/.",
        )
    return {
        k.removesuffix("_SL"): frozenset(s for v in ids for s in _list_stems(k, str(v)))
        for k, ids in content.items()
    }


SOURCE = Source(
    name="wavcaps",
    summary="WavCaps: json_files/ with split zips (read in place) or unpacked FLAC",
    plan=plan,
    raw_samples=raw_samples,
    options={
        "blacklist": Option(
            None, "a file of json_files/blacklist/, relative to IN, whose clips are left out"
        ),
        "sources": Option(
            None, f"what is built, separated by commas: {', '.join(SOURCES)}; default: all"
        ),
        "missing": MISSING_OPTION,
    },
    licence="WavCaps: academic use only; clips under their own licences",
    reads_as_stored=True,
)
