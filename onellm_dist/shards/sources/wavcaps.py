"""`onellm shards build wavcaps IN OUT`: WavCaps as its repository on the Hub is laid out.

    json_files/{AudioSet_SL,BBC_Sound_Effects,FreeSound,SoundBible}/*.json      {"num_captions_per_audio": 1, "data": [{id, caption, ...}]}
    json_files/blacklist/blacklist_exclude_*.json                               {"AudioSet": [ids], "FreeSound": [ids]}
    Zip_files/<source>/<source>.z01, ..., <source>.zip                          split archives, read where they lie, and/or
    <any folder with the source's name in its path>/<id>.flac                   the unpacked files

AudioSet's ids carry a leading `Y` and the suffix `.wav`; they are found with and without. Fields that only some sources have go to `.json`.
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
from onellm_dist.shards.sources.readers.missing_media import MISSING_OPTION, check_missing
from onellm_dist.shards.sources.readers.pool import MediaPool, find_media, find_pool

SOURCES = ("AudioSet_SL", "BBC_Sound_Effects", "FreeSound", "SoundBible")
SUFFIXES = (".flac", ".wav")
_JSON, _ROWS = "json_files", 2000
_ENDINGS = (".wav", ".flac", ".mp3")
_YOUTUBE = 11
"""Characters of a YouTube id."""


def plan(
    inputs: Path, *, seed: int, blacklist: str | None, sources: str | None, missing: str
) -> DatasetDescription:
    """Ranges of the rows of each source's JSON.

    Raises:
        UsageError: no JSON or no audio of a source, an unknown source, or no such blacklist.
    """
    check_missing(missing)
    wanted = SOURCES if sources is None else tuple(s.strip() for s in sources.split(","))
    if not set(wanted) <= set(SOURCES):
        raise UsageError(
            f"sources={sources}: one of them is none of {', '.join(SOURCES)}.",
            "it is not in WavCaps.",
            "correct it.",
        )
    if blacklist is not None:
        _blacklist(inputs, blacklist)
    tables = {name: _tables(inputs, name) for name in wanted}
    if not any(tables.values()):
        raise UsageError(
            f"{inputs / _JSON}: no JSON of {', '.join(wanted)} there.",
            "there are no captions.",
            "give the folder that has json_files/ in it.",
        )
    pool, pools = find_pool(inputs, SUFFIXES), dict[str, MediaPool]()
    for name, found in tables.items():
        pools[name] = pool.filter_by_name(name)
        if found and not pools[name]:
            raise UsageError(
                f"{inputs}: {found[0]} is there, and no folder of .flac and no .zip has {name} in its path.",
                "captions have no audio.",
                f"fetch Zip_files/{name}, or leave the source out: -o sources={','.join(s for s in wanted if s != name)}",
            )
    notes = tuple(
        f"no {_JSON}/{name}: that source is left out" for name, found in tables.items() if not found
    )
    if blacklist is None:
        notes += (
            "no blacklist: clips of AudioCaps' and Clotho's test sets may be among the samples",
        )
    groups = chain.from_iterable(
        _groups(inputs, name, table, pools[name])
        for name, found in tables.items()
        for table in found
    )
    return DatasetDescription(("audio",), groups, notes, {"blacklist": blacklist})


def _tables(inputs: Path, name: str) -> list[str]:
    """The JSON files of a source; `x_2s.json` (clips of 2 s and more) is left out beside `x.json`, which has them all."""
    found = sorted(p.relative_to(inputs).as_posix() for p in (inputs / _JSON / name).glob("*.json"))
    return [
        f
        for f in found
        if f.replace("_2s.json", ".json") not in found or not f.endswith("_2s.json")
    ]


def _groups(inputs: Path, name: str, table: str, pool: MediaPool) -> Iterator[InputSplit]:
    with (inputs / table).open("rb") as file:
        key = (
            None if file.read(100).lstrip(b"\xef\xbb\xbf \r\n").startswith(b"[") else "data"
        )  # the set's first version: the list alone
    yield from split_rows(inputs, table, _ROWS, key=key, source=name, pool=pool.to_json())


def raw_samples(
    inputs: Path,
    description: SplitDescription,
    *,
    blacklist: str | None,
    sources: str | None,
    missing: str,
) -> Iterator[RawSample]:
    """Of one range of rows."""
    pool, name = MediaPool.from_json(description["pool"]), description["source"]
    listed = (
        _blacklist(inputs, blacklist).get(name.removesuffix("_SL"), frozenset())
        if blacklist
        else frozenset()
    )
    for where, number, _, row in read_rows(inputs, description):
        identity = row.get("id") if isinstance(row, dict) else None
        if not isinstance(identity, (str, int)) or not str(identity).strip():
            yield RawSample(f"{name}/row-{number:09d}", where, problem="unreadable row: no id")
            continue
        stems = _stems(name, str(identity))
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


def _stems(source: str, identity: str) -> tuple[str, ...]:
    """The names that the file of an id may have, its own first."""
    stem = next((identity[: -len(e)] for e in _ENDINGS if identity.lower().endswith(e)), identity)
    if source.startswith("AudioSet"):
        if len(stem) == _YOUTUBE:
            return stem, f"Y{stem}"
        if len(stem) == _YOUTUBE + 1 and stem[0] == "Y":
            return stem, stem[1:]
    return (stem,)


@lru_cache(maxsize=2)
def _blacklist(inputs: Path, name: str) -> Mapping[str, frozenset[str]]:
    """Source (`AudioSet`, `FreeSound`) to the stems that are left out.

    Raises:
        UsageError: no such file, or another content.
    """
    path = inputs / name
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: {error}",
            "what is in evaluation sets would be trained on.",
            "check the option blacklist (relative to IN).",
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise UsageError(
            f"{path} is no object of lists.",
            "it is no blacklist of WavCaps.",
            "use one of json_files/blacklist/.",
        )
    return {
        k.removesuffix("_SL"): frozenset(s for v in ids for s in _stems(k, str(v)))
        for k, ids in content.items()
    }


SOURCE = Source(
    name="wavcaps",
    summary="WavCaps: json_files/ with split zips (read in place) or unpacked FLAC",
    plan=plan,
    raw_samples=raw_samples,
    options={
        "blacklist": Option(
            None, "a file of WavCaps' json_files/blacklist/, relative to IN: its clips are left out"
        ),
        "sources": Option(None, f"only these, by comma: {', '.join(SOURCES)}"),
        "missing": MISSING_OPTION,
    },
    licence="WavCaps: academic use only; clips under their own licences",
)
