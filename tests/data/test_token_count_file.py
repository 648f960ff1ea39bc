"""The file of token counts: what is read is what was written, or an error in words."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from onellm_dist.common.errors import OneLLMError
from onellm_dist.data.token_count_file import load_token_counts, save_token_counts
from onellm_dist.shards.format.dataset import ShardInfo

SHARD = ShardInfo("shards/x.tar", "train", 4, 10240, "0" * 64)
ONE_EACH = np.array([[9, 8], [7, 6], [5, 4], [3, 2]], dtype=np.uint16)
SEVERAL = np.array([[0, 9, 8], [0, 7, 6], [1, 5, 4], [2, 3, 2], [3, 3, 2]], dtype=np.uint32)


@pytest.mark.parametrize("counts", [ONE_EACH, SEVERAL])
def test_what_was_written_is_read_by_us_and_by_numpy(tmp_path: Path, counts: np.ndarray) -> None:
    path = tmp_path / "folder/x.npy"
    save_token_counts(path, counts)
    read = load_token_counts(path, SHARD)
    assert np.array_equal(read.counts, counts[:, -2:])
    assert (read.starts is None) == (counts.shape[1] == 2)
    assert np.array_equal(np.load(path), counts)


@pytest.mark.parametrize("counts", [ONE_EACH, SEVERAL])
def test_files_without_a_checksum_are_read(tmp_path: Path, counts: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", counts)
    assert np.array_equal(load_token_counts(tmp_path / "x.npy", SHARD).counts, counts[:, -2:])


@pytest.mark.parametrize("counts", [ONE_EACH, SEVERAL])
def test_a_flipped_bit_is_found(tmp_path: Path, counts: np.ndarray) -> None:
    path = tmp_path / "x.npy"
    save_token_counts(path, counts)
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 400):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(OneLLMError, match=r"x\.npy: "):
            load_token_counts(path, SHARD)


def test_a_header_never_sizes_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, ONE_EACH)
    whole = path.read_bytes()
    for shape in (b"(4, 2), }", b"(4000000000000, 2), }", b"(4, -2), }", b"('x', 2), }", b"4" * 40):
        path.write_bytes(whole.replace(b"(4, 2), }" + b" " * (len(shape) - 9), shape))
        if shape == b"(4, 2), }":
            assert len(load_token_counts(path, SHARD).counts) == 4
        else:
            with pytest.raises(OneLLMError):
                load_token_counts(path, SHARD)
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        try:
            read = load_token_counts(path, SHARD)
        except OneLLMError:
            continue
        assert read.counts.shape == (4, 2)
