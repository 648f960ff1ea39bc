"""Media of requests: hashed once, and called by the names that their senders gave them."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import requests
import served_model as served
import torch
from media_samples import picture
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.common.workers import pool, process
from onellm_dist.common.workers.samples import SampleLimits
from onellm_dist.serving import media
from onellm_dist.serving.media import GivenFiles, GivenFilesReader, read_given_files
from onellm_dist.serving.server.decoded import DecodedMedia
from onellm_dist.serving.server.media import MediaReader, hash_files


@pytest.fixture(scope="module")
def reader() -> Iterator[MediaReader]:
    reader = MediaReader(1, SampleLimits(30, 1500))
    yield reader
    reader.close()


@pytest.mark.slow
def test_media_are_known_by_the_digests_that_they_were_given(reader: MediaReader) -> None:
    one, other = (GivenFiles("image", {"image": served.make_picture(seed)}) for seed in (0, 1))
    first = asyncio.run(reader.read([one, other], ["a", "b"]))
    again = asyncio.run(reader.read([other, one], ["a", "b"]))  # not hashed again
    assert all(torch.equal(value, kept) for value, kept in zip(first, again, strict=True))
    plain = asyncio.run(reader.read([other]))
    assert torch.equal(plain[0], first[1]) and reader.decoded == 3
    assert hash_files(one) == hash_files(one._replace(names={"image": "cat.png"}))
    assert len({hash_files(each) for each in (one, other, one._replace(most=2))}) == 3


@pytest.mark.slow
def test_a_medium_of_a_request_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    original = hashlib.sha256

    def sha256(data: bytes = b"") -> Any:
        digest = original(data)

        class Counting:
            hexdigest = staticmethod(digest.hexdigest)

            def update(self, more: bytes) -> None:
                hashed.append(len(more))
                digest.update(more)

        return Counting()

    monkeypatch.setattr(hashlib, "sha256", sha256)
    picture = served.make_picture(0)
    with served.serve(served.make_model(), max_new_tokens=2) as address:
        body = served.make_body("What?", served.make_part("image", picture))
        headers = {"Content-Type": "application/json"}
        answer = requests.post(f"{address}/v1/chat/completions", data=body, headers=headers)
    assert answer.status_code == 200
    assert hashed.count(len(picture)) == 1


@pytest.mark.parametrize(
    ("modality", "parts"),
    [
        *((name, (name,)) for name in ("image", "video", "audio", "point", "imu", "fmri")),
        ("depth", ("depth", "image")),
        ("normal", ("normal", "image")),
    ],
)
@pytest.mark.seconds
def test_a_bad_file_is_called_by_its_own_name(modality: str, parts: tuple[str, ...]) -> None:
    """Never by a name that was made up for it."""
    files = dict.fromkeys(parts, b"no medium at all")
    named = GivenFiles(modality, files, names={part: f"my {part}.bin" for part in parts})
    with pytest.raises(SampleError) as error:
        read_given_files([named])
    assert error.value.what.startswith(f"{modality} my {parts[0]}.bin")
    assert "my " in error.value.what.split(": ", 1)[1]
    with pytest.raises(SampleError) as error:
        read_given_files([named._replace(names=None)], first=3)
    assert error.value.what.startswith(f"medium 3 ({modality}): its ")
    assert not re.search(r"\.\w+ \(\d+ bytes\)", error.value.what)


@pytest.mark.parametrize("names", [("kitchen.jpg", "hall.jpg"), ("a.jpg.png", "b.depth.png")])
def test_a_name_that_looks_like_a_made_up_one_is_passed_on_as_it_is(names: tuple[str, str]) -> None:
    parts = ("depth", "image")
    for broken, name in zip(parts, names, strict=True):
        files = {part: served.make_picture(0) for part in parts} | {broken: b"no medium at all"}
        with pytest.raises(SampleError) as error:
            read_given_files(
                [GivenFiles("depth", files, names=dict(zip(parts, names, strict=True)))]
            )
        said = error.value.what.removeprefix(f"depth {', '.join(names)}: ")
        assert [word for word in said.split() if "." in word and word[0].isalpha()] == [name]


@pytest.mark.seconds
def test_a_process_reads_many_media_and_none_after_a_bad_or_large_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    original = process.fork_worker

    def fork_worker(*args: Any) -> int:
        started.append(original(*args))
        return started[-1]

    monkeypatch.setattr(pool, "fork_worker", fork_worker)
    pictures = [GivenFiles("image", {"image": served.make_picture(seed)}) for seed in range(3)]
    expected = [read_given_files([picture])[0] for picture in pictures]
    started.clear()
    reader = GivenFilesReader(SampleLimits(30, 1500))
    try:
        for picture, values in zip(pictures, expected, strict=True):
            assert torch.equal(reader.read([picture])[0], values)
        assert len(started) == 1
        with pytest.raises(SampleError, match=r"^medium 4 \(image\): "):
            reader.read([GivenFiles("image", {"image": b"no picture"})], first=4)
        assert torch.equal(reader.read(pictures[:1])[0], expected[0])
        assert len(started) == 2
        monkeypatch.setattr(media, "_MOST_KEPT", -(1 << 40))  # any medium is large
        reader.read(pictures[:1])
        reader.read(pictures[:1])
        assert len(started) == 3
        monkeypatch.setattr(media, "_MOST_KEPT", 1 << 40)
        monkeypatch.setattr(media, "_MOST_READ", 2)
        reader.close()
        for _ in range(4):
            assert torch.equal(reader.read(pictures[1:2])[0], expected[1])
        assert len(started) == 5
    finally:
        reader.close()
    assert not any(psutil.pid_exists(pid) for pid in started)


@pytest.mark.seconds
def test_media_of_earlier_requests_are_not_decoded_again() -> None:
    files = [
        GivenFiles("image", {"image": picture(Image.new("RGB", (9, 9), colour)).data})
        for colour in ("red", "green", "blue")
    ]
    reader = MediaReader(1, SampleLimits(30, 1000))
    try:
        first = asyncio.run(reader.read([files[0], files[1], files[0]]))
        again = asyncio.run(reader.read([files[1], files[2]]))
    finally:
        reader.close()
    assert reader.decoded == 3
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], again[0])
    assert not torch.equal(again[0], again[1])


def test_kept_media_stay_within_their_memory() -> None:
    kept = DecodedMedia(max_bytes=250)
    for number in range(3):
        kept.put(str(number), torch.full((25,), float(number)))
        assert kept.get("0") is not None  # what is used stays
    assert kept.get("1") is None
    assert kept.get("2") is not None
