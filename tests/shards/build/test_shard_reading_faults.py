"""Unreadable files: a fault of the file costs its sample, one of the disk stops the build."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shard_worlds import contents, picture, write_tree

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards import build_dataset, open_dataset
from onellm_dist.shards.build import prepare as prepare_module
from onellm_dist.shards.build.images import reencode_pictures
from onellm_dist.shards.build.prepare import _read
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.clouds import TensorCloud
from onellm_dist.shards.storage.paths import RemotePath, translate_store_errors


class Failing:
    """Media that raise, and are intact from the `good`-th try on."""

    def __init__(self, error: Callable[[], Exception], good: int = 10) -> None:
        self.error, self.good, self.tries = error, good, 0

    def read_bytes(self) -> bytes:
        self.tries += 1
        if self.tries < self.good:
            raise self.error()
        return b"whole"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "PAUSES", (0.0, 0.0))


PASSING = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale"),
    OSError(errno.EMFILE, "Too many"),
    TimeoutError(),
    ConnectionResetError(),
]
LASTING = [
    FileNotFoundError(2, "No such", "a"),
    PermissionError(13, "Denied", "a"),
    OSError(errno.ENAMETOOLONG, "long", "a"),
    ValueError("embedded null byte"),
    OSError("no gzip file"),
    RecursionError(),
]


@pytest.mark.parametrize("error", PASSING, ids=[f"{type(e).__name__}-{e.errno}" for e in PASSING])
def test_a_fault_of_the_disk_is_tried_again_and_then_stops_the_build(error: OSError) -> None:
    assert _read(Failing(lambda: error, good=3)) == b"whole"
    with pytest.raises(OneLLMError, match=r", 3 times\.") as caught:
        _read(Failing(lambda: error))
    assert not isinstance(caught.value, (BadSampleError, UsageError))


@pytest.mark.parametrize(
    "error", LASTING, ids=[f"{type(e).__name__}-{i}" for i, e in enumerate(LASTING)]
)
def test_what_is_wrong_with_a_file_is_one_bad_sample(error: Exception) -> None:
    media = Failing(lambda: error)
    with pytest.raises(BadSampleError, match=r"^(missing|unreadable) file: "):
        _read(media)
    assert media.tries == 1


@pytest.mark.parametrize("error", [UsageError("no model"), MemoryError()], ids=["model", "memory"])
def test_what_makes_the_media_must_be_there(error: Exception) -> None:
    with pytest.raises(type(error)):
        _read(Failing(lambda: error))


def test_stores_fail_in_errors_of_their_own() -> None:
    with (
        pytest.raises(OSError, match="RuntimeError: payload") as caught,
        translate_store_errors(RemotePath("memory://x/a.jpg")),
    ):
        raise RuntimeError("payload")
    assert caught.value.errno == errno.EIO
    with pytest.raises(RuntimeError), translate_store_errors(Path("a.jpg")):
        raise RuntimeError("a fault of the program")


@pytest.mark.parametrize("damage", ["struct", "cut", "text"])
def test_a_broken_tensor_file_is_one_bad_sample(tmp_path: Path, damage: str) -> None:
    torch.save(
        torch.zeros(6, 16), tmp_path / "x.pt", _use_new_zipfile_serialization=damage != "struct"
    )
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(
        {"struct": data[: len(data) // 2], "cut": data[:-40], "text": b"no tensor"}[damage]
    )
    with pytest.raises(BadSampleError, match=r"unreadable \.pt: x"):
        TensorCloud(tmp_path / "x.pt", "x").read_bytes()


def test_a_picture_that_cannot_be_encoded_again_is_a_bad_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = picture(1)

    def broken(*_: object, **__: object) -> None:
        raise TypeError("no encoder")

    monkeypatch.setattr("PIL.Image.Image.save", broken)
    with pytest.raises(BadSampleError, match="unreadable picture: TypeError: no encoder"):
        reencode_pictures({"jpg": data}, frozenset({"jpg"}), None, 80)


def test_half_a_surrogate_pair_costs_one_sample(tmp_path: Path) -> None:
    half = (
        b'{"conversations": [{"from": "human", "value": "a\\ud83d"}, '
        b'{"from": "gpt", "value": "b"}]}'
    )
    files = {
        "a.jpg": picture(0),
        "a.json": half,
        "b.jpg": picture(1),
        "b.json": b'{"caption": "b"}',
        "c.jpg": picture(2),
        "c.json": b'{"caption": "c\\udc00"}',
    }
    report = build_dataset(
        "folder",
        write_tree(tmp_path / "in", files),
        tmp_path / "out",
        options={"max_failures": 0.9},
    )
    assert list(contents(open_dataset(tmp_path / "out"))) == ["b"]
    assert [q.reason for q in report.quarantined] == [
        r"malformed conversations: turn 0 is not valid text: half a surrogate pair, '\ud83d', "
        "at character 1",
        r"caption is not valid text: .json: half a surrogate pair, \udc00, at character 1",
    ]
