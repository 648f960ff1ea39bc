"""The token-count cache: counted once, complete or absent, for this shard and this tokenizer."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_worlds import caption, tokenizer, write

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.data import shard_texts
from onellm_dist.data import token_counts as token_counts_module
from onellm_dist.data.text import TextEncoder
from onellm_dist.data.token_counts import (
    FOLDER,
    UNREADABLE,
    TokenCounts,
    build_token_counts,
    get_token_count_path,
)
from onellm_dist.modalities import Part
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.parts import read_parts
from onellm_dist.shards.format.writer import DatasetWriter


@pytest.fixture
def talk(tmp_path: Path) -> Dataset:
    return write(tmp_path, "talk", [], 17)


def encoder(text_format: str = "caption", tokens: int = 96) -> TextEncoder:
    return TextEncoder(tokenizer(), text_format, tokens)  # type: ignore[arg-type]


def read_all(counts: TokenCounts, shard: int, samples: int) -> Any:
    """[n, 2] token counts of every row of a shard of the first dataset, in epoch 0."""
    return counts.get(0, shard, np.arange(samples), np.zeros(samples, dtype=np.int64))


@pytest.mark.parametrize("text_format", ["caption", "conversation"])
def test_counts_are_those_of_the_texts(talk: Dataset, text_format: str) -> None:
    text = encoder(text_format)
    assert build_token_counts([talk], text, show=False) == 17
    counts = TokenCounts([talk], text.fingerprint, "train", seed=0)
    for number, shard in enumerate(talk.shards()):
        for row in range(shard.samples):
            ids, labels = text.encode(read_parts(talk, shard, row))
            assert read_all(counts, number, shard.samples)[row].tolist() == [
                len(ids),
                sum(label >= 0 for label in labels),
            ]


def test_they_are_counted_once(talk: Dataset) -> None:
    text = encoder()
    build_token_counts([talk], text, show=False)
    assert build_token_counts([talk], text, show=False) == 0
    assert build_token_counts([talk], encoder(tokens=5), show=False) == 17
    get_token_count_path(talk, talk.shards()[1], text.fingerprint).unlink()
    assert build_token_counts([talk], text, show=False) == 7


@pytest.mark.slow
def test_processes_count_the_same(talk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    text = encoder()
    build_token_counts([talk], text, show=False)
    paths = [get_token_count_path(talk, shard, text.fingerprint) for shard in talk.shards()]
    alone = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    reduce, pickled = Dataset.__reduce__, list[Dataset]()

    def record(dataset: Dataset) -> Any:
        pickled.append(dataset)
        return reduce(dataset)

    monkeypatch.setattr(Dataset, "__reduce__", record)
    assert build_token_counts([talk], text, workers=2, show=False) == 17
    assert len(pickled) <= 2  # once per process, not once per shard
    assert [path.read_bytes() for path in paths] == alone
    assert not list(talk.root.rglob("*.staged"))


def test_a_rebuilt_shard_is_counted_again(tmp_path: Path, talk: Dataset) -> None:
    text = encoder()
    build_token_counts([talk], text, show=False)
    other = write(tmp_path / "again", "talk", [], 16)
    other_root = other.root
    (talk.root / FOLDER).rename(other_root / FOLDER)
    again = open_dataset(other_root)
    same = sum(a.sha256 == b.sha256 for a, b in zip(talk.shards(), again.shards(), strict=True))
    assert same == 2
    assert build_token_counts([again], text, show=False) == 16 - 14


def with_captions(root: Path, captions: list[bytes]) -> Dataset:
    with DatasetWriter(root / "some", name="some", modalities=()) as writer:
        for number, text in enumerate(captions):
            writer.add("train", f"k{number}", {"txt": text})
    return open_dataset(root / "some")


def test_text_that_cannot_be_read_is_marked_and_the_rest_is_counted(tmp_path: Path) -> None:
    dataset, text = with_captions(tmp_path, [b"a red cube", b"caf\xe9", b"a"]), encoder()
    build_token_counts([dataset], text, show=False)
    pairs = read_all(TokenCounts([dataset], text.fingerprint, "train", seed=0), 0, 3)
    assert pairs.tolist() == [[5, 4], list(UNREADABLE), [3, 2]]


def test_a_shard_without_any_such_text_is_refused(talk: Dataset, tmp_path: Path) -> None:
    dataset = with_captions(tmp_path, [caption(0).encode()] * 3)
    with pytest.raises(
        UsageError, match=r"none of its 3 samples has text for data.text_format=conversation"
    ):
        build_token_counts([talk, dataset], encoder("conversation"), show=False)
    assert not get_token_count_path(
        dataset, dataset.shards()[0], encoder("conversation").fingerprint
    ).exists()


def test_a_disk_fault_is_not_recorded(talk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from onellm_dist.common.errors import SampleError

    def failing(dataset: Dataset, *rest: object) -> dict[str, Part]:
        raise SampleError("dataset talk: Input/output error.") from OSError(5, "Input/output error")

    monkeypatch.setattr(shard_texts, "read_parts_with_retries", failing)
    with pytest.raises(OneLLMError, match="Input/output error"):
        build_token_counts([talk], encoder(), show=False)
    assert not list(talk.root.rglob("*.npy"))


def test_a_damaged_file_is_named(talk: Dataset) -> None:
    text = encoder()
    build_token_counts([talk], text, show=False)
    first, second = (
        get_token_count_path(talk, shard, text.fingerprint) for shard in talk.shards()[:2]
    )
    first.write_bytes(b"no array")
    np.save(second, np.zeros((3, 2), dtype=np.uint16))
    for number, path in enumerate((first, second)):
        with pytest.raises(OneLLMError, match=path.name):
            read_all(TokenCounts([talk], text.fingerprint, "train", seed=0), number, 1)


@pytest.mark.parametrize("permissions", [0o755, 0o2775, 0o750, 0o700])
def test_counts_have_the_permissions_of_their_dataset(talk: Dataset, permissions: int) -> None:
    """A run keeps its own files from others; a shared dataset stays one."""
    talk.root.chmod(permissions)
    before = os.umask(0o027)
    try:
        build_token_counts([talk], encoder(), show=False)
    finally:
        os.umask(before)
    made = [talk.root / FOLDER, *(talk.root / FOLDER).rglob("*")]
    assert len(made) == 2 + 3
    for path in made:
        wanted = permissions if path.is_dir() else permissions & 0o666
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize("depth", [0, 1])
def test_counts_that_another_user_keeps_are_counted_into_the_cache(
    talk: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path / "cache"))
    text, access = encoder(), os.access
    build_token_counts([talk], text, show=False)
    closed = (talk.root / FOLDER, talk.root / FOLDER / text.fingerprint)[depth]
    kept = [path.read_bytes() for path in sorted(closed.rglob("*.npy"))]
    closed.chmod(0)
    if os.geteuid() == 0:  # root may do everything
        monkeypatch.setattr("os.access", lambda p, m: closed not in (p, p.parent) and access(p, m))
    try:
        assert build_token_counts([talk], text, show=False) == 17
        assert build_token_counts([talk], text, show=False) == 0
        read_all(TokenCounts([talk], text.fingerprint, "train", seed=0), 0, 1)
        assert len(list((tmp_path / "cache").rglob("token_counts/talk/*/*.npy"))) == 3
    finally:
        closed.chmod(0o755)
    assert [path.read_bytes() for path in sorted(closed.rglob("*.npy"))] == kept


@pytest.mark.parametrize("variable", ["ONELLM_CACHE", "XDG_CACHE_HOME"])
def test_counts_of_a_read_only_dataset_go_to_the_cache(
    talk: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("ONELLM_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda path, mode: path != talk.root)
    text = encoder()
    assert build_token_counts([talk], text, show=False) == 17
    assert not (talk.root / FOLDER).exists()
    assert len(list((tmp_path / "cache").rglob("token_counts/talk/*/*.npy"))) == 3
    assert build_token_counts([talk], text, show=False) == 0
    assert len(read_all(TokenCounts([talk], text.fingerprint, "train", seed=0), 0, 7)) == 7


def test_the_cache_is_bounded(talk: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    text = encoder()
    build_token_counts([talk], text, show=False)
    monkeypatch.setattr(token_counts_module, "MAX_MEMORY", 1)
    counts = TokenCounts([talk], text.fingerprint, "train", seed=0)
    assert [len(read_all(counts, n, count)) for n, count in ((0, 7), (1, 7), (2, 3), (0, 7))] == [
        7,
        7,
        3,
        7,
    ]
    assert len(counts._kept) == 1


def test_all_memory_of_the_cache_is_counted(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "many", name="many", modalities=(), max_samples=4) as writer:
        for i in range(12):
            writer.add(
                "train",
                f"k{i}",
                {"json": json.dumps({"caption": ["a red cube"] * (1 + i % 3)}).encode()},
            )
    dataset, text = open_dataset(tmp_path / "many"), encoder()
    build_token_counts([dataset], text, show=False)
    counts = TokenCounts([dataset], text.fingerprint, "train", seed=0)
    for number in range(3):
        read_all(counts, number, 4)
    held = [
        array
        for texts in counts._kept.values()
        for array in (texts.counts, texts.starts)
        if array is not None
    ]
    assert counts._bytes == sum(
        (array if array.base is None else array.base).nbytes for array in held
    )
