"""Text samples that need no media: a source for the tests of the builder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shard_worlds import split_arguments, write_tree

from onellm_dist.shards import build_dataset
from onellm_dist.shards.build import registry
from onellm_dist.shards.sources.base import (
    BuildReport,
    DatasetDescription,
    InputSplit,
    Option,
    RawSample,
    Source,
    SplitDescription,
)


def _plan(inputs: Path, *, seed: int, group: int) -> DatasetDescription:
    rows = len((inputs / "rows.txt").read_text().splitlines())
    groups = (
        InputSplit(
            f"rows:{i}", {"first": i, "last": min(i + group, rows)}, count=None if i else group
        )
        for i in range(0, rows, group)
    )
    return DatasetDescription((), groups)


def _raw_samples(inputs: Path, description: SplitDescription, *, group: int) -> Iterator[RawSample]:
    lines = (inputs / "rows.txt").read_text().splitlines()
    for number in range(description["first"], description["last"]):
        if number < len(lines):
            key, _, text = lines[number].partition(":")
            skip = "not wanted" if text == "skip" else None
            yield RawSample(
                key,
                f"rows.txt:{number + 1}",
                caption=text,
                meta={"url": f"http://{text}"},
                skip=skip,
            )


ROWS = Source(
    "rows",
    "a test's text samples",
    plan=_plan,
    raw_samples=_raw_samples,
    options={"group": Option(10, "rows a group", int)},
)


def register_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the source `rows` known."""
    known = {**registry.all_sources(), "rows": ROWS}
    monkeypatch.setattr(registry, "all_sources", lambda: known)


def write_rows(folder: Path, count: int = 60) -> Path:
    """Rows with bad, skipped and repeated ones."""
    lines = [f"k{i:03d}:caption number {i}" for i in range(count)]
    lines[7], lines[20], lines[33] = "k007:", "k020:skip", "k003:caption of a repeated key"
    lines[41] = "k041:caption number 12"
    return write_tree(folder, {"rows.txt": "\n".join(lines)})


BUILD: dict[str, Any] = {"name": "rows", "max_samples": 8, "dedup": "exact", "group": 10}


def build(inputs: Path, out: Path, **options: Any) -> BuildReport:
    return build_dataset("rows", inputs, out, **split_arguments({**BUILD, **options}))
