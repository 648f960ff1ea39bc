"""`onellm shards preview --key`: find samples by their key, and say where they lie."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.format.dataset import Dataset, ShardInfo
from onellm_dist.shards.format.parts import read_parts

_EPOCH = re.compile(r"@\d+$")
_SHOWN = 200
"""Characters of a text that a terminal shows."""


class NamedSample(NamedTuple):
    """A sample that was found by its key."""

    shard: ShardInfo
    row: int
    key: str


def find_samples(dataset: Dataset, names: Sequence[str]) -> list[NamedSample]:
    """Find samples by name, in all splits; only indexes are read.

    Args:
        dataset: an open dataset.
        names: each a key, or a sample's id as runs name it (`dataset/shard-name/key@epoch`; the
            epoch, and the names before the key, may be left out).

    Raises:
        UsageError: one is not there; the message has the keys that are most like it.
    """
    wanted = {name: _list_readings(dataset, name) for name in dict.fromkeys(names)}
    found: dict[str, list[NamedSample]] = {name: [] for name in wanted}
    seen: list[str] = []
    for shard in (s for split in dataset.splits for s in dataset.shards(split)):
        keys = dataset.index(shard).keys()
        seen += keys[: max(0, 100_000 - len(seen))]
        rows = {key: row for row, key in enumerate(keys)}
        for name, readings in wanted.items():
            found[name] += [
                NamedSample(shard, rows[key], key)
                for where, key in readings
                if key in rows and where in (None, shard.name)
            ]
    for name, samples in found.items():
        if not samples:
            like = difflib.get_close_matches(name.rpartition("/")[2], seen, n=3, cutoff=0.5)
            raise UsageError(
                f"dataset {dataset.location} has no sample {name!r}.",
                "nothing can be shown of it.",
                f"keys like it: {', '.join(like)}."
                if like
                else f"its keys look like {seen[0]!r}."
                if seen
                else "check the dataset.",
            )
    return list(dict.fromkeys(sample for samples in found.values() for sample in samples))


def _list_readings(dataset: Dataset, name: str) -> list[tuple[str | None, str]]:
    """List what a name may mean: (shard name or None, key)."""
    readings: list[tuple[str | None, str]] = []
    for text in dict.fromkeys((name, _EPOCH.sub("", name))):
        readings.append((None, text))
        rest = text.removeprefix(f"{dataset.name}/")
        shard, slash, key = rest.partition("/")
        if slash:
            readings.append((shard, key))
    return readings


def describe_sample(dataset: Dataset, sample: NamedSample) -> str:
    """Describe a sample in lines for a terminal: where it lies, and its parts."""
    shard, row, key = sample
    start, end = dataset.index(shard).span(row)
    lines = [
        f"{dataset.name}/{shard.name}/{key}",
        f"  split {shard.split}, {dataset.location}/{shard.path}, row {row}, "
        f"bytes {start} to {end}",
    ]
    try:
        parts = read_parts(dataset, shard, row)
    except OneLLMError as error:
        lines += [f"  .{e}, {p.size} bytes" for e, p in dataset.index(shard).parts(row).items()]
        return "\n".join([*lines, f"  cannot be read: {error.what}"])
    for extension, part in parts.items():
        text = ""
        if extension in ("txt", "json"):
            shown = part.data[: 4 * _SHOWN].decode(errors="replace")[:_SHOWN]
            text = f": {''.join(c if c.isprintable() else ' ' for c in shown)}"
        lines.append(f"  .{extension}, {len(part.data)} bytes{text}")
    return "\n".join(lines)
