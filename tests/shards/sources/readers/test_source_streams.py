"""Reading large tables by byte offset in bounded memory, and zip members across volumes."""

from __future__ import annotations

import csv
import io
import random
import shutil
import subprocess
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from shard_worlds import write_tree

from onellm_dist.shards.sources.readers import archives
from onellm_dist.shards.sources.readers.archives import ArchiveIndex, list_entries
from onellm_dist.shards.sources.readers.delimited import (
    CSV,
    TSV,
    Dialect,
    RowRange,
    find_row_ranges,
    read_header,
    read_rows,
)


def all_rows(table: Path, dialect: Dialect, names: list[str], size: int) -> list[list[str]]:
    """Every row through ranges of `size`, each read by itself."""
    _, start = read_header(table, dialect)
    ranges = list(find_row_ranges(table, dialect, size, start))
    assert all(r.size == size for r in ranges[:-1])
    found = [list(read_rows(table, dialect, r, names)) for r in ranges]
    assert [len(f) for f in found] == [r.size for r in ranges]
    assert [f[0].line for f in found] == [r.line for r in ranges]
    return [list(row.values.values()) for rows in found for row in rows]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_rows_of_a_csv_are_those_of_the_csv_module(tmp_path: Path, ending: str) -> None:
    draw = random.Random(0)
    words = ["plain", "with, comma", 'with "quotes"', "two" + ending + "lines", "", "grün", '"']
    rows = [[draw.choice(words), draw.choice(words) or "x", str(i)] for i in range(200)]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator=ending)
    writer.writerow(["a", "b", "c"])
    writer.writerows(rows)
    text = buffer.getvalue().replace(
        f"{ending}plain", f"{ending}{ending}plain"
    )  # blank lines say nothing
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_header(tmp_path / "t.csv", CSV)[0] == ["a", "b", "c"]
    expected = [r for r in csv.reader(io.StringIO(text, newline="")) if r][1:]
    assert len(expected) == 200
    for size in (1, 7, 200, 1000):
        assert all_rows(tmp_path / "t.csv", CSV, ["a", "b", "c"], size) == expected


def test_a_quote_that_is_never_closed_loses_its_own_row_alone(tmp_path: Path) -> None:
    lines = ["a,b", '1,"open', *(f"{i},text" for i in range(2, 100)), '100,"closed"']
    (tmp_path / "t.csv").write_text("\n".join(lines))
    _, start = read_header(tmp_path / "t.csv", CSV)
    for size in (1, 10, 1000):
        rows = [
            row
            for r in find_row_ranges(tmp_path / "t.csv", CSV, size, start)
            for row in read_rows(tmp_path / "t.csv", CSV, r, ["a", "b"])
        ]
        assert [r.problem for r in rows] == ["unreadable row: a quote is opened and not closed"] + [
            None
        ] * 99
        assert rows[-1].values == {"a": "100", "b": "closed"}


def test_quotes_are_letters_in_a_tsv(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('a\tb\n5" pipe\t"enclosed ""so"""\n"one side\tx\n')
    assert all_rows(tmp_path / "t.tsv", TSV, ["a", "b"], 1) == [
        ['5" pipe', 'enclosed "so"'],
        ['"one side', "x"],
    ]


@pytest.mark.seconds
def test_planning_a_table_takes_the_same_memory_whatever_its_length(tmp_path: Path) -> None:
    peaks = []
    for count in (20_000, 200_000):
        (tmp_path / "t.csv").write_text(
            "id,text\n" + "".join(f"{i},some words about sample {i}\n" for i in range(count))
        )
        tracemalloc.start()
        assert (
            sum(r.size for r in find_row_ranges(tmp_path / "t.csv", CSV, 5000, RowRange(8, 2, 0)))
            == count
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 10_000
    assert peaks[1] < 300_000


@pytest.mark.skipif(shutil.which("zip") is None, reason="Info-ZIP's zip makes the split archives")
def test_members_of_a_split_archive_come_out_as_they_went_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes around those of a volume (64 KiB), stored and deflated; names that are not ASCII."""
    draw = random.Random(0)
    files: dict[str, bytes | str] = {
        f"d/{i:03d}.flac": draw.randbytes(draw.choice([0, 10, 30_000, 65_500, 65_536, 200_000]))
        for i in range(24)
    }
    files |= {
        "d/grün.flac": b"text " * 30_000,
        "d/other.txt": b"not wanted",
        "e/.hidden.flac": b"nor this",
    }
    write_tree(tmp_path / "tree", files)
    subprocess.run(
        ["zip", "-q", "-r", "-s", "64k", str(tmp_path / "a.zip"), "."],
        cwd=tmp_path / "tree",
        check=True,
    )
    assert len(list(tmp_path.glob("a.z*"))) > 10
    assert {e.name for e in list_entries(tmp_path / "a.zip")} == set(files)
    monkeypatch.setattr(archives, "_CHUNK", 100)
    index = ArchiveIndex(tmp_path / "a.zip", (".flac",))
    assert len(index) == 25
    for name, content in files.items():
        found = index.find(Path(name).stem)
        if name.endswith(".flac") and "hidden" not in name:
            assert found is not None
            assert found[1].read_bytes() == content
        else:
            assert found is None


def test_zip64_as_in_archives_beyond_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With low limits the standard library takes all for large, and writes every zip64 field."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    contents = {f"{i}": bytes([i]) * (200 + i) for i in range(9)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for stem, content in contents.items():
            archive.writestr(f"{stem}.flac", content)
    assert b"PK\x06\x06" in (tmp_path / "a.zip").read_bytes()
    index = ArchiveIndex(tmp_path / "a.zip", (".flac",))
    for stem, content in contents.items():
        found = index.find(stem)
        assert found is not None
        assert found[1].read_bytes() == content
