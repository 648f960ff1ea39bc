"""Copies of a benchmark's media in training shards are found; what only looks alike is not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_samples import sound_by_ffmpeg
from PIL import Image
from shard_worlds import write_tree

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import Part
from onellm_dist.shards import build_dataset
from onellm_dist.shards.tools.fingerprints import (
    MediaFingerprint,
    PictureFingerprint,
    compute_fingerprint,
    fingerprint_picture,
)
from onellm_dist.shards.tools.overlap import find_overlap, format_overlap, write_overlap
from onellm_dist.shards.tools.overlap_search import (
    WORDS,
    MediaIndex,
    TextIndex,
    count_bits,
)


def make_scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A scene of soft light and some hard shapes, as photographs have them."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 255, (5, 6, 3), np.uint8))
    pixels = np.array(soft.resize(size, Image.Resampling.BICUBIC))
    for _ in range(6):
        x, y = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 20)
        w, h = rng.integers(8, 45, 2)
        pixels[y : y + h, x : x + w] = rng.integers(0, 255, 3)
    noise = rng.normal(0, 4, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def encode(picture: Image.Image, kind: str = "JPEG", quality: int = 90) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, quality=quality)
    return out.getvalue()


def encode_again(picture: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encode(picture, quality=40)))


def crop(left: float, top: float, right: float, bottom: float) -> Callable[[Any], Any]:
    def cut(picture: Image.Image) -> Image.Image:
        w, h = picture.size
        return picture.crop((int(left * w), int(top * h), int(right * w), int(bottom * h)))

    return cut


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "encoded again": encode_again,
    "smaller": lambda p: p.resize((97, 71)),
    "larger": lambda p: p.resize((700, 500), Image.Resampling.BICUBIC),
    "grey": lambda p: p.convert("L").convert("RGB"),
    "cropped around": crop(0.025, 0.025, 0.975, 0.975),
    "cropped left and top": crop(0.05, 0.05, 1, 1),
    "cropped right": crop(0, 0, 0.95, 1),
    "cropped and encoded": lambda p: encode_again(crop(0.02, 0.03, 0.97, 0.98)(p)),
}


def wrap(*pictures: PictureFingerprint) -> MediaFingerprint:
    return MediaFingerprint({}, pictures)


@pytest.fixture(scope="module")
def scenes() -> MediaIndex:
    return MediaIndex([wrap(fingerprint_picture(make_scene(seed))) for seed in range(100)])


@pytest.mark.parametrize("change", CHANGES)
def test_changed_pictures_are_found(scenes: MediaIndex, change: str) -> None:
    for seed in range(0, 100, 19):
        changed = CHANGES[change](make_scene(seed))
        found = scenes.find(wrap(fingerprint_picture(changed)))
        assert [match.place for match in found] == [seed], (change, seed, found)
        # and where the benchmark has the changed one
        index = MediaIndex([wrap(fingerprint_picture(changed))])
        assert len(index.find(wrap(fingerprint_picture(make_scene(seed))))) == 1


def test_ten_thousand_pairs_of_other_pictures_are_none(scenes: MediaIndex) -> None:
    for seed in range(1000, 1100):
        assert scenes.find(wrap(fingerprint_picture(make_scene(seed)))) == []
    flat = Image.new("RGB", (50, 50), "red")
    assert MediaIndex([wrap(fingerprint_picture(flat))]).find(wrap(fingerprint_picture(flat))) == []


def test_most_frames_of_a_video_must_be_there() -> None:
    frames = [fingerprint_picture(make_scene(seed)) for seed in range(6)]
    index = MediaIndex([wrap(*frames[:3]), None, wrap(*frames[3:])])
    assert [m.place for m in index.find(wrap(*frames[:3]))] == [0]
    assert [m.place for m in index.find(wrap(frames[3], frames[4], frames[0]))] == [2]
    assert index.find(wrap(frames[0], fingerprint_picture(make_scene(9)), frames[3])) == []


def make_wave(seed: int, rate: int = 44100, seconds: float = 4.0) -> np.ndarray:
    """Notes that come and go over some noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(rate * seconds)) / rate
    wave = np.zeros_like(time)
    for _ in range(12):
        start, pitch = rng.uniform(0, seconds), rng.uniform(150, 3000)
        envelope = np.exp(-8 * np.abs(time - start))
        wave += envelope * np.sin(2 * np.pi * pitch * time)
    coarse = np.random.default_rng(seed + 500).normal(0, 0.05, int(8000 * seconds))
    wave += np.interp(time, np.arange(len(coarse)) / 8000, coarse)
    return (0.2 * wave).astype(np.float32)


def fingerprint_sound(wave: np.ndarray, rate: int, container: str, codec: str) -> MediaFingerprint:
    part = Part(container, sound_by_ffmpeg(wave, rate, container, codec))
    return compute_fingerprint(("audio",), {container: part}, {})


@pytest.mark.seconds
def test_sounds_of_another_rate_and_codec_are_found_and_others_not() -> None:
    stored = [fingerprint_sound(make_wave(seed), 44100, "wav", "pcm_s16le") for seed in range(5)]
    index = MediaIndex(stored)
    for seed in range(5):
        for rate, container, codec in (
            (16000, "wav", "pcm_s16le"),
            (8000, "flac", "flac"),
            (22050, "mp3", "libmp3lame"),
        ):
            copy = fingerprint_sound(make_wave(seed, rate), rate, container, codec)
            found = index.find(copy)
            assert [m.place for m in found] == [seed], (seed, rate, found)
            assert found[0].how.startswith("sound")
    for seed in range(100, 110):
        assert index.find(fingerprint_sound(make_wave(seed), 44100, "wav", "pcm_s16le")) == []


def test_words_are_compared_in_runs() -> None:
    question = "what is the man in the red coat holding in his left hand"
    index = TextIndex({"a": [question], "b": ["what is it"], "c": ["short words only here"]})
    assert index.find(["Look: WHAT is the man, in the red coat?"]) == {"a"}
    assert index.find(["the man in the red coat has a dog"]) == set()
    assert len(["what", "is", "the", "man", "in", "the", "red", "coat"]) == WORDS
    assert index.find(["what is it"]) == set()  # too common to mean anything
    assert count_bits(np.array([0, 2**64 - 1, 5], np.uint64)).tolist() == [0, 64, 2]


def build_world(root: Path) -> tuple[Path, Path]:
    """A benchmark of four pictures; training data with two of them, and words of a question."""
    question = "what is the colour of the small car behind the old wooden house"
    rows = [
        {
            "question_id": i,
            "image_id": f"im{i}",
            "question": f"{question} {i}?" if i == 3 else "?",
            "answers": ["red"] * 10,
        }
        for i in range(4)
    ]
    benchmark: dict[str, bytes | str] = {"TextVQA_0.5.1_val.json": json.dumps({"data": rows})}
    benchmark |= {f"train_images/im{i}.jpg": encode(make_scene(i)) for i in range(4)}
    build_dataset(
        "textvqa-eval",
        write_tree(root / "in", benchmark),
        root / "textvqa-eval",
        options={"any_count": True},
    )
    training: dict[str, bytes | str] = {
        "a.jpg": encode(make_scene(1)),
        "a.txt": "a picture",
        "b.jpg": encode(CHANGES["cropped around"](make_scene(2)), quality=70),
        "b.txt": f"He asks {question}",
        "c.jpg": encode(make_scene(50)),
        "c.txt": "another picture",
    }
    build_dataset("folder", write_tree(root / "raw", training), root / "train")
    return root / "train", root / "textvqa-eval"


def test_training_shards_are_compared_with_a_benchmark(tmp_path: Path) -> None:
    training, benchmark = build_world(tmp_path)
    report = find_overlap([training, benchmark])
    how = {name: how.split()[0] for name, (_, how) in report.media.items()}
    assert how == {"textvqa/1": "same", "textvqa/2": "picture"}
    assert report.media["textvqa/1"][0].endswith("/a") and report.compared == 3
    assert set(report.texts) == {"textvqa/3"} and not report.unreadable
    write_overlap(tmp_path / "out", report)
    lines = (tmp_path / "out" / "media.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["textvqa/1", "textvqa/2"]
    assert json.loads((tmp_path / "out" / "overlap.json").read_text())["questions"] == 4
    assert "2 questions have a medium" in format_overlap(tmp_path / "out", report)
    for alone in ([training], [benchmark]):
        with pytest.raises(UsageError, match="name at least one of each"):
            find_overlap(alone)
