"""Opening datasets and reading samples by their index."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_worlds import contents, text_dataset

from onellm_dist.common.errors import OneLLMError, SampleError, UsageError
from onellm_dist.shards.format.dataset import Manifest, ShardInfo, open_dataset
from onellm_dist.shards.format.index import ShardIndex, count_text_bytes, get_index_path
from onellm_dist.shards.format.parts import read_parts

SAMPLES = {
    f"k{i}": {"bin": bytes([i]) * (700 * i), "json": b"{}", "txt": b"text %d" % i} for i in range(5)
}


def test_only_the_wanted_parts_are_read(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "set", SAMPLES)
    shard = dataset.shards()[0]
    assert {e: p.data for e, p in read_parts(dataset, shard, 3, {"txt", "bin", "mp4"}).items()} == {
        "bin": b"\x03" * 2100,
        "txt": b"text 3",
    }
    assert read_parts(dataset, shard, 3, {"mp4"}) == {}
    assert all(e == p.extension for e, p in read_parts(dataset, shard, 3).items())
    with pytest.raises(IndexError):
        read_parts(dataset, shard, 5)


def test_a_flipped_byte_is_an_error_that_names_its_place(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "set", SAMPLES)
    shard = dataset.shards()[0]
    place = dataset.index(shard).parts(2)["bin"]
    tar = dataset.tar_path(shard)
    data = bytearray(tar.read_bytes())
    data[place.offset + 17] ^= 1
    tar.write_bytes(data)
    with pytest.raises(
        SampleError,
        match=re.escape(
            f"dataset texts, shard {shard.path}, key k2, part .bin at offset {place.offset}: "
            "its bytes fail"
        ),
    ):
        read_parts(dataset, shard, 2)
    assert read_parts(dataset, shard, 2, {"txt"})["txt"].data == b"text 2"
    assert read_parts(dataset, shard, 1)["bin"].data == b"\x01" * 700


def test_a_tar_that_shrinks_or_vanishes_while_it_is_read(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "set", SAMPLES)
    shard = dataset.shards()[0]
    dataset.index(shard)
    tar = dataset.tar_path(shard)
    tar.write_bytes(tar.read_bytes()[: dataset.index(shard).parts(4)["bin"].offset + 100])
    with pytest.raises(
        SampleError, match=r"key k4, part \.bin at offset \d+: only 100 of its 2800 bytes"
    ):
        read_parts(dataset, shard, 4)
    tar.unlink()
    with pytest.raises(SampleError, match="key k0, offset") as caught:
        read_parts(dataset, shard, 0)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_dataset_travels_to_another_process(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "set", SAMPLES, max_samples=2)
    dataset.index(dataset.shards()[0])
    again = pickle.loads(pickle.dumps(dataset))
    assert contents(again) == SAMPLES
    assert again.fingerprint() == dataset.fingerprint()


def test_text_bytes_prefers_the_caption_file(tmp_path: Path) -> None:
    samples = {
        "a": {"txt": "grün".encode(), "json": b'{"caption": "something longer"}'},
        "b": {"json": '{"caption": "grün!"}'.encode()},
        "c": {
            "json": b'{"conversations": [{"from": "human", "value": "hi"}, '
            b'{"from": "gpt", "value": "ho ho"}]}'
        },
        "d": {"json": b"[broken"},
        "e": {"bin": b"x"},
    }
    dataset = text_dataset(tmp_path / "set", samples)
    index = dataset.index(dataset.shards()[0])
    assert (
        [index.text_bytes(r) for r in range(5)]
        == index.all_text_bytes().tolist()
        == [5, 6, 7, 0, 0]
    )
    for unreadable in (
        b'{"conversations": 3}',
        b'{"caption": "a\\ud83d"}',
        b'{"conversations": [{"value": "\\ud83d"}]}',
        b"[" * 100_000,
    ):
        assert count_text_bytes(None, unreadable) == 0


def test_spans_cover_the_tar_without_gaps(tmp_path: Path) -> None:
    """They are the numbers of Energon's `.tar.idx`: the starts of samples, then the end."""
    dataset = text_dataset(tmp_path / "set", SAMPLES)
    index = dataset.index(dataset.shards()[0])
    spans = [index.span(r) for r in range(index.samples)]
    assert spans[0][0] == 0
    assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
    data = dataset.tar_path(dataset.shards()[0]).read_bytes()
    assert not any(data[spans[-1][1] :])
    assert index.keys() == list(SAMPLES)
    assert index.extension_sets() == {frozenset({"bin", "json", "txt"}): (5, 0)}


def test_kinds_of_samples_that_differ(tmp_path: Path) -> None:
    dataset = text_dataset(
        tmp_path / "set",
        {"a": {"txt": b""}, "b": {"json": b""}, "c": {"txt": b""}, "d": {"txt": b"", "json": b""}},
    )
    kinds = dataset.index(dataset.shards()[0]).extension_sets()
    assert kinds == {
        frozenset({"txt"}): (2, 0),
        frozenset({"json"}): (1, 1),
        frozenset({"txt", "json"}): (1, 3),
    }


def edit_manifest(root: Path, **changes: object) -> None:
    path = root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    root = tmp_path / "parent/set"
    dataset = text_dataset(root, SAMPLES, max_samples=2)
    for path, message in [
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path / "parent", "name one, such as"),
        (tmp_path, "has no manifest.json"),
    ]:
        with pytest.raises(UsageError, match=message):
            open_dataset(path)
    with pytest.raises(UsageError, match="has no split 'val'"):
        dataset.shards("val")
    edit_manifest(root, version=99)
    with pytest.raises(UsageError, match="its version is 99"):
        open_dataset(root)
    edit_manifest(root, format="other")
    with pytest.raises(UsageError, match="its format is 'other'"):
        open_dataset(root)
    (root / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        open_dataset(root)


def test_missing_shards_and_indexes_are_found_at_once(tmp_path: Path) -> None:
    dataset = text_dataset(tmp_path / "set", SAMPLES, max_samples=1)
    get_index_path(dataset.tar_path(dataset.shards()[1])).unlink()
    with pytest.raises(
        UsageError, match=r"shards/train-000001\.tar\.index(.|\n)*onellm shards index"
    ):
        open_dataset(dataset.root)
    dataset.tar_path(dataset.shards()[2]).unlink()
    with pytest.raises(UsageError, match=r"train-000002\.tar\."):
        open_dataset(dataset.root)


def test_an_index_of_another_tar_is_refused(tmp_path: Path) -> None:
    a = text_dataset(tmp_path / "a", {"k": {"txt": b"one"}})
    b = text_dataset(tmp_path / "b", {"k": {"txt": b"two"}})
    shard = a.shards()[0]
    get_index_path(a.tar_path(shard)).write_bytes(get_index_path(b.tar_path(shard)).read_bytes())
    with pytest.raises(OneLLMError, match="do not belong together"):
        open_dataset(a.root).index(shard)
    c = text_dataset(tmp_path / "c", {"k": {"txt": b"three"}})
    with c.tar_path(shard).open("ab") as file:
        file.write(b"\x00" * 512)
    with pytest.raises(OneLLMError, match="do not belong together"):
        open_dataset(c.root).index(c.shards()[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: b"", "it has 0 bytes"),
        (lambda d: b"x" + d[1:], "does not start"),
        (lambda d: d[:8] + b"\x07" + d[9:], "its version is 7"),
        (lambda d: d[:-64], "its header says"),
        (lambda d: d[:40] + b"\xff" + d[41:], "header fails its CRC-32"),
        (lambda d: d[:60], "header fails its CRC-32"),
    ],
)
def test_damaged_indexes_are_recognised(tmp_path: Path, damage: object, message: str) -> None:
    dataset = text_dataset(tmp_path / "set", SAMPLES)
    path = get_index_path(dataset.tar_path(dataset.shards()[0]))
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(OneLLMError, match=message):
        ShardIndex(path)


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """In memory where that is possible: making 82,800 files takes a minute on a busy disk."""
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_dataset_of_the_size_of_laion_400m_opens_at_once(fast_folder: Path) -> None:
    """41,400 shards, 4e8 samples: under 5 s and 500 MB, because no index is opened before use."""
    shards = tuple(
        ShardInfo(f"shards/train-{i:06d}.tar", "train", 9662, 10**9, f"{i:064x}")
        for i in range(41_400)
    )
    (fast_folder / "shards").mkdir()
    for shard in shards:
        os.mknod(f"{fast_folder}/{shard.path}")
        os.mknod(f"{fast_folder}/{shard.path}.index")
    (fast_folder / "manifest.json").write_bytes(
        Manifest("laion", ("image",), ("txt",), "CC-BY-4.0", "x", shards).to_bytes()
    )
    script = """
import sys, time
from pathlib import Path
from onellm_dist.shards import open_dataset
start = time.process_time()  # of this process: the machine may be busy
samples = open_dataset(Path(sys.argv[1])).samples("train")
seconds = time.process_time() - start
status = Path("/proc/self/status").read_text().splitlines()
peak = next(line for line in status if line.startswith("VmHWM"))
print(samples, seconds, int(peak.split()[1]) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(fast_folder)], check=True, capture_output=True, text=True
    )
    samples, seconds, megabytes = map(float, done.stdout.split())
    assert samples == 41_400 * 9662
    assert seconds < 5
    assert megabytes < 500


def test_a_manifest_of_0_1_0_has_the_same_fingerprint(tmp_path: Path) -> None:
    """Its bytes are those of today's without the checksum."""
    dataset = text_dataset(tmp_path / "set", {"a": {"txt": b"x"}})
    path = dataset.root / "manifest.json"
    new = path.read_bytes()
    assert hashlib.sha256(dataset.manifest.to_bytes()).hexdigest() == dataset.fingerprint()
    path.write_bytes(dataset.manifest.to_bytes())
    old = open_dataset(dataset.root)
    assert (old.fingerprint(), old.manifest) == (dataset.fingerprint(), dataset.manifest)
    assert new.startswith(path.read_bytes().removesuffix(b"\n}\n")) and b"checksum" in new
    path.write_bytes(new.replace(b'"train"', b'"trial"'))
    with pytest.raises(UsageError, match="it was changed after it was written"):
        open_dataset(dataset.root)
