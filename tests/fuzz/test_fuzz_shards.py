"""Damaged and hostile shards: index, manifest, tar. The true samples, or a refusal in words."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import fuzz, replay
from mutators import STRINGS, mutate_any, mutate_bytes, mutate_json, mutate_value

from onellm_dist.common.errors import OneLLMError
from onellm_dist.shards.format.dataset import MANIFEST, Dataset, open_dataset
from onellm_dist.shards.format.index import _FIXED, get_index_path
from onellm_dist.shards.format.manifest import Manifest, add_checksum
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.format.tars import BLOCK, salvage_tar, scan_tar
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.shards.sources.readers.img2dataset import list_tar_members

SAMPLES = {
    f"folder/k{i}": {
        "bin": bytes(range(256)) * (i % 3 + 1),
        "txt": f"text {i}".encode(),
        "json": b'{"caption": "%d"}' % i,
    }
    for i in range(6)
}
FIRST = "shards/train-000000.tar"
QUICK_AND_SOAK = [1, pytest.param(60, marks=pytest.mark.soak)]
"""How many times the quick number of cases."""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """One shard of six samples."""
    return write_dataset(tmp_path / "set")


def write_dataset(root: Path) -> Dataset:
    with DatasetWriter(root, name="texts", modalities=()) as writer:
        for key, parts in SAMPLES.items():
            writer.add("train", key, parts)
    return open_dataset(root)


def read_all(dataset: Dataset) -> dict[str, dict[str, bytes]]:
    """Key to parts of every sample, and every other value that an index gives."""
    found = {}
    for split in dataset.splits:
        for shard in dataset.shards(split):
            index = dataset.index(shard)
            assert next(iter(index.extension_sets().values()))[0] == len(SAMPLES)
            for row, key in enumerate(index.keys()):
                assert key == index.key(row)
                assert index.text_bytes(row) == len(SAMPLES.get(key, {}).get("txt", b""))
                parts = read_parts(dataset, shard, row)
                found[key] = {e: p.data for e, p in parts.items()}
    return found


def open_index_with(root: Path) -> Any:
    """Make the surface that opens the dataset with another index."""
    path = get_index_path(root / FIRST)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        refusal = None
        try:
            found = read_all(open_dataset(root))
        except OneLLMError as error:
            refusal = error
        if refusal is None:
            assert found == SAMPLES
            return
        assert "dataset texts, shard shards/train-000000.tar" in refusal.what and refusal.do
        raise refusal

    return run


def seal_index(header: bytes, body: bytes) -> bytes:
    """An index with right checksums, whatever is in it."""
    fixed = _FIXED.pack(b"ONELLMIX", 1, len(header), zlib.crc32(header), zlib.crc32(body))
    return fixed + header + body


def mutate_index(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change header, columns or both of an index, and make its checksums right again."""
    whole = rng.choice(seeds)
    end = _FIXED.size + _FIXED.unpack_from(whole)[2]
    header, body = json.loads(whole[_FIXED.size : end]), whole[end:]
    if rng.random() < 0.5:
        header = mutate_value(rng, header)
    else:
        column = header["columns"][rng.choice(sorted(header["columns"]))]
        values = np.frombuffer(body, column["dtype"], column["count"], column["offset"]).copy()
        if len(values):
            at, width = rng.randrange(len(values)), 8 * values.itemsize
            value = int(values[at])
            flipped = value ^ (1 << rng.randrange(width))
            other = rng.choice(
                (0, 1, 2**63, 2**width - 1, flipped, int(rng.choice(values)), value + 1)
            )
            values[at] = other % (1 << width)
            if rng.random() < 0.2:
                values = values[rng.sample(range(len(values)), len(values))]
        start = column["offset"]
        body = body[:start] + values.tobytes() + body[start + values.nbytes :]
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return seal_index(text + b" " * (-(len(text) + _FIXED.size) % 64), body)


@pytest.mark.slow
@pytest.mark.parametrize("times", QUICK_AND_SOAK)
def test_indexes(dataset: Dataset, times: int) -> None:
    """Bytes of an index: the true samples, or an error that names dataset, shard and remedy."""
    path = get_index_path(dataset.root / FIRST)
    fuzz(
        "index",
        open_index_with(dataset.root),
        [path.read_bytes()],
        mutate_bytes,
        cases=1500 * times,
    ).require_clean(least_refused=1000)


@pytest.mark.slow
@pytest.mark.parametrize("times", QUICK_AND_SOAK)
def test_indexes_with_right_checksums(dataset: Dataset, times: int) -> None:
    """Written to deceive: no traceback, no memory; another sample's bytes have another CRC-32."""
    path = get_index_path(dataset.root / FIRST)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        opened = open_dataset(dataset.root)
        index = opened.index(opened.shards()[0])
        assert index.samples == len(SAMPLES) and len(set(map(len, index.keys()))) >= 1
        for row in range(index.samples):
            read_parts(opened, opened.shards()[0], row)

    fuzz("sealed-index", run, [path.read_bytes()], mutate_index, cases=1500 * times).require_clean(
        least_refused=1000
    )


def mutate_sealed_manifest(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change values of a manifest, and make its checksum right again."""
    data = mutate_json(rng, [json.dumps(drop_checksum(s)).encode() for s in seeds])
    return add_checksum(data[:-1]) if rng.random() < 0.5 and data.endswith(b"}") else data


def drop_checksum(data: bytes) -> Any:
    value = json.loads(data)
    del value["checksum"]
    return value


@pytest.mark.slow
@pytest.mark.parametrize("times", QUICK_AND_SOAK)
def test_manifests(dataset: Dataset, times: int) -> None:
    """Values of a manifest, with a right checksum or none: what is accepted stays in its folder."""
    whole = (dataset.root / MANIFEST).read_bytes()

    def run(data: bytes) -> None:
        (dataset.root / MANIFEST).write_bytes(data)
        manifest = Manifest.from_bytes(data, dataset.root / MANIFEST)
        for shard in manifest.shards:
            path = (dataset.root / shard.path).resolve()
            assert path.is_relative_to(dataset.root.resolve()) and "/" not in shard.name
        again = Manifest.from_bytes(manifest.to_file(), "again")
        assert again.to_bytes() == manifest.to_bytes()
        found = read_all(open_dataset(dataset.root))
        assert found in (SAMPLES, {})

    fuzz(
        "manifest", run, [whole], mutate_any(mutate_sealed_manifest), cases=2000 * times
    ).require_clean(least_refused=1000)


@pytest.mark.parametrize("place", range(100))
@pytest.mark.seconds
def test_a_flipped_bit_of_a_manifest_is_found(dataset: Dataset, place: int) -> None:
    whole = bytearray((dataset.root / MANIFEST).read_bytes())
    rng = random.Random(place)
    at = rng.randrange(len(whole))
    whole[at] ^= 1 << rng.randrange(8)
    (dataset.root / MANIFEST).write_bytes(whole)
    try:
        opened = open_dataset(dataset.root)
    except OneLLMError:
        return
    # The name of the checksum itself, or the last line's white space: nothing else was damaged.
    assert at >= bytes(whole).rindex(b"\n  ") and opened.manifest == dataset.manifest


@pytest.fixture(scope="module")
def tar_seeds() -> list[bytes]:
    """Tars in the three formats, one with names that need a PAX or GNU header."""
    return [
        make_tar([(f"{k}.{e}", d) for k, p in SAMPLES.items() for e, d in p.items()], form)
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ] + [
        make_tar([("é" * 70 + f"/{'k' * 60}.txt", b"x"), ("b.jpg", b"y" * 600)], form)
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ]


def make_tar(members: Sequence[tuple[str, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def mutate_tar(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Change a field of one to three headers, and make their checksums right again."""
    data = bytearray(rng.choice(seeds))
    headers = [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    for at in rng.choices(headers, k=rng.choice((1, 1, 2, 3))):
        name, start, size = rng.choice(_FIELDS)
        if name == "text":
            value = rng.choice(STRINGS).encode("utf-8", "replace")[:size]
        else:
            value = rng.choice(_NUMBERS)[:size]
        data[at + start : at + start + size] = value.ljust(size, b"\0")
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])
    return mutate_bytes(rng, [bytes(data)]) if rng.random() < 0.1 else bytes(data)


_FIELDS = (
    ("text", 0, 100),
    ("number", 100, 8),
    ("number", 124, 12),
    ("number", 124, 12),
    ("number", 136, 12),
    ("text", 156, 1),
    ("type", 156, 1),
    ("text", 157, 100),
    ("text", 265, 32),
    ("number", 329, 8),
    ("text", 345, 155),
    ("number", 386, 12),
    ("number", 483, 12),
)
_NUMBERS = (
    b"77777777777",
    b"00000000000",
    b"-0000000001",
    b"99999999999",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"\x80" + b"\0" * 10 + b"\x05",
    b"\xff" * 11 + b"\0",
    b"",
    b" 12 ",
    b"xyz",
    b"L",
    b"K",
    b"x",
    b"g",
    b"S",
    b"1",
    b"2",
    b"5",
    b"00000001000",
)


@contextmanager
def tar_file(folder: Path, data: bytes) -> Iterator[Path]:
    (folder / "x.tar").write_bytes(data)
    yield folder / "x.tar"


def scan(folder: Path) -> Any:
    """Make the surface that indexes a tar: what it says of a part is what lies there."""

    def run(data: bytes) -> None:
        with tar_file(folder, data) as path:
            list_tar_members(path)
            rows, _ = salvage_tar(path)
            for parts in rows.parts:
                for place in parts.values():
                    assert zlib.crc32(data[place.offset :][: place.size]) == place.crc32
            found = scan_tar(path)
            assert found.rows.keys == rows.keys and len(set(rows.keys)) == len(rows.keys)
            assert found.rows.starts == sorted(found.rows.starts) and found.end <= len(data)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("times", QUICK_AND_SOAK)
def test_tars(tmp_path: Path, tar_seeds: list[bytes], times: int) -> None:
    mutate = mutate_any(mutate_tar, mutate_bytes)
    fuzz("tar", scan(tmp_path), tar_seeds, mutate, cases=2000 * times).require_clean(1000)


def test_the_corpus_of_tars(tmp_path: Path) -> None:
    replay("tar", scan(tmp_path))


def test_the_corpus_of_indexes(dataset: Dataset) -> None:
    replay("index", open_index_with(dataset.root))


def test_the_corpus_of_manifests() -> None:
    replay("manifest", lambda data: Manifest.from_bytes(data, "manifest.json").to_file())
