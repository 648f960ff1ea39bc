"""Tables and lists of samples, mutated: JSON, JSON lines, CSV, parquet and Arrow."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from harness import fuzz
from mutators import Mutator, mutate_any, mutate_bytes, mutate_json, mutate_lines
from PIL import Image
from pyarrow import parquet as pq

from onellm_dist.shards.build.confine import confine, find_allowed_roots
from onellm_dist.shards.build.registry import complete_options, get_source


def make_picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURE = make_picture()


def read_source(root: Path, source: str, name: str, **given: Any) -> Callable[[bytes], None]:
    """Plan and list a source whose table, `name` below `root`, has the mutated bytes.

    Every raw sample has a key and media below the root, or says what is wrong.
    """
    chosen = get_source(source)
    options, _ = complete_options(chosen, given, name="x")
    assert chosen.plan is not None and chosen.raw_samples is not None
    plan, read = chosen.plan, chosen.raw_samples
    (root / "0.jpg").write_bytes(PICTURE)

    def run(data: bytes) -> None:
        (root / name).write_bytes(data)
        roots = find_allowed_roots(chosen, root, options, None)
        for split in plan(root, seed=0, **options).input_splits:
            samples = list(read(root, json.loads(json.dumps(split.description)), **options))
            assert split.count is None or len(samples) == split.count, "another number of rows"
            for sample in confine(samples, roots):
                assert sample.key and sample.where
                if sample.problem is None and sample.skip is None:
                    for media in sample.parts.values():
                        try:
                            stored = media.read_bytes()
                        except (OSError, ValueError):
                            continue  # no such file: a bad sample
                        assert stored == PICTURE, "the bytes of another file"

    return run


TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A disc."}]
ROWS = [
    {"id": i, "image": "0.jpg", "caption": "x", "conversations": TURNS, "n": [1, {"a": None}]}
    for i in range(3)
]
LIST = json.dumps(ROWS).encode()
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
CSV = b'file,caption,n\n0.jpg,"a ""b"", c",1\n0.jpg,x,2\n0.jpg,"two\nlines",3\n'
TSV = CSV.replace(b",", b"\t")
MIXED = mutate_any(mutate_bytes, mutate_lines)
CAPTIONS = {"captions": "t.json"}
QUICK_AND_SOAK = [1, pytest.param(15, marks=pytest.mark.soak)]
"""How many times the quick number of cases."""
FORMS: dict[str, tuple[str, str, list[bytes], Mutator, dict[str, Any]]] = {
    "json list": ("folder", "t.json", [LIST], mutate_json, CAPTIONS),
    "json bytes": ("folder", "t.json", [LIST, LINES], mutate_bytes, CAPTIONS),
    "json lines": ("folder", "t.jsonl", [LINES], mutate_lines, {"captions": "t.jsonl"}),
    "csv": ("folder", "t.csv", [CSV, TSV], MIXED, {"captions": "t.csv"}),
    "lists": ("reference-lists", "t.json", [LIST, LINES], mutate_bytes, {"modality": "image"}),
    "llava": ("llava665k", "llava_v1_5_mix665k.json", [LIST], mutate_json, {}),
    "sharegpt": ("sharegpt", "t.jsonl", [LINES], MIXED, {}),
}


@pytest.mark.parametrize("times", QUICK_AND_SOAK)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.seconds
def test_tables_of_text(tmp_path: Path, form: str, times: int) -> None:
    source, name, seeds, mutate, options = FORMS[form]
    run = read_source(tmp_path, source, name, **options)
    # where a row is a line, every fault is one of a row
    least = 0 if form == "sharegpt" else 1
    fuzz(f"table {form}", run, seeds, mutate, cases=150 * times).require_clean(least)


def make_table(kind: str) -> bytes:
    rows = [{"image": {"bytes": PICTURE, "path": "0.jpg"}, "text": "x", "n": i} for i in range(4)]
    table, buffer = pa.Table.from_pylist(rows), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, buffer, row_group_size=3)
    else:
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with new(buffer, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return buffer.getvalue()


@pytest.mark.parametrize("times", QUICK_AND_SOAK)
@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.seconds
def test_tables_of_arrow(tmp_path: Path, kind: str, times: int) -> None:
    """A flipped bit in a picture is a picture with a flipped bit: no checksum lies beside it."""
    name = "t.parquet" if kind == "parquet" else "t.arrow"
    inner = read_source(tmp_path, "parquet", name, modality="image")

    def run(data: bytes) -> None:
        try:
            inner(data)
        except AssertionError as error:
            if "bytes of another file" not in str(error):
                raise

    cases = 200 * times
    fuzz(f"arrow {kind}", run, [make_table(kind)], mutate_bytes, cases=cases).require_clean()
