"""Several spans of one medium: tiles of a picture, windows of a sound, stretches of a film."""

from __future__ import annotations

import io
import wave

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from onellm_dist.common.errors import SampleError
from onellm_dist.common.media_size import MediaSize
from onellm_dist.modalities import Modality, Part, all_modalities, get_modality
from onellm_dist.modalities.spans import share_spans
from onellm_dist.modalities.transforms.crops import SIDE, normalise, split_channels
from onellm_dist.modalities.transforms.tiles import choose_grid, cut_tiles
from onellm_dist.modalities.video import compute_clip_starts

RNG = np.random.default_rng(0)


def picture(width: int, height: int, kind: str = "PNG") -> dict[str, Part]:
    out = io.BytesIO()
    pixels = np.random.default_rng([width, height]).integers(0, 255, (height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(out, kind)
    return {"image": Part("png", out.getvalue())}


def sound(seconds: float, rate: int = 16000) -> dict[str, Part]:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        noise = np.random.default_rng(1).standard_normal(int(seconds * rate)) * 5000
        file.writeframes(noise.astype("<i2").tobytes())
    return {"audio": Part("wav", out.getvalue())}


def film(seconds: int, rate: int = 5) -> dict[str, Part]:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = 64, 48
        for n in range(seconds * rate):
            grey = np.full((48, 64, 3), n * 250 // (seconds * rate), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return {"video": Part("mp4", out.getvalue())}


def read(modality: Modality, parts: dict[str, Part], spans: int) -> list[torch.Tensor]:
    return modality.read_spans(parts, {}, spans=spans, train=False, rng=RNG)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(2, 12))
@pytest.mark.seconds
def test_the_grid_is_llava_nexts(width: int, height: int, most: int) -> None:
    """transformers' own choice among the same grids, in the same order."""
    grids = [
        (SIDE * (n // c), SIDE * c) for n in range(1, most) for c in range(1, n + 1) if n % c == 0
    ]
    rows, columns = (side // SIDE for side in select_best_resolution((height, width), grids))
    assert choose_grid(width, height, range(1, most)) == (columns, rows)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(2, 12))
def test_a_number_of_tiles_gives_the_grid_that_it_was_counted_for(
    width: int, height: int, most: int
) -> None:
    columns, rows = choose_grid(width, height, range(1, most))
    assert choose_grid(width, height, [columns * rows]) == (columns, rows)
    spans = get_modality("image").count_spans(MediaSize(width, height), most)
    assert 1 <= spans <= most
    assert spans == (1 + columns * rows if columns * rows > 1 else 1)


def test_tiles_show_the_whole_picture_once() -> None:
    source = Image.open(io.BytesIO(picture(448, 224)["image"].data))
    whole, left, right = cut_tiles(source, 2)
    assert {p.size for p in (whole, left, right)} == {(SIDE, SIDE)}
    assert np.array_equal(np.hstack([np.asarray(left), np.asarray(right)]), np.asarray(source))
    # a picture that does not fill its grid is centred on black
    tall = cut_tiles(Image.new("RGB", (100, 500), (255, 255, 255)), 3)
    column = np.vstack([np.asarray(p) for p in tall[1:]])[:, :, 0]
    shown = np.flatnonzero(column[336])
    assert (shown[0], shown[-1]) == (44, 178) and column[:, 111].min() == 255


def test_one_span_is_the_reference_bit_for_bit() -> None:
    for name, parts in (("image", picture(300, 200)), ("audio", sound(30)), ("video", film(3))):
        modality = get_modality(name)
        plain = modality.read_value(parts, {}, train=False, rng=RNG)
        (one,) = read(modality, parts, 1)
        assert torch.equal(plain, one)
    assert compute_clip_starts(100, 10.0) == compute_clip_starts(100, 10.0, 5)


def test_spans_of_a_picture() -> None:
    image = get_modality("image")
    parts = picture(900, 300)
    assert image.measure(parts) == MediaSize(900, 300)
    values = read(image, parts, 4)
    source = image.decode(parts, {})
    expected = [normalise(split_channels(p)) for p in cut_tiles(source, 3)]
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))


def test_windows_of_a_sound() -> None:
    audio = get_modality("audio")
    parts = sound(25)
    size = audio.measure(parts)
    assert size.seconds == 25
    assert [audio.count_spans(size, n) for n in (1, 2, 3, 9)] == [1, 2, 3, 3]
    assert audio.count_spans(MediaSize(seconds=11.0), 9) == 1  # the rest is too short
    assert audio.count_spans(MediaSize(seconds=11.3), 9) == 2
    assert audio.count_spans(MediaSize(), 9) == 1
    first, second, third = read(audio, parts, 3)
    assert torch.equal(first, audio.read_value(parts, {}, train=False, rng=RNG))
    # the second window is what a file that begins there would give
    rate, data = 16000, parts["audio"].data
    start = round(10.24 * rate)
    cut = io.BytesIO()
    with wave.open(io.BytesIO(data)) as file, wave.open(cut, "wb") as out:
        out.setparams(file.getparams())
        file.setpos(start)
        out.writeframes(file.readframes(file.getnframes()))
    alone = audio.read_value({"audio": Part("wav", cut.getvalue())}, {}, train=False, rng=RNG)
    assert torch.equal(second, alone)
    silence = third[:, :, 470:]  # 4.52 s of sound, then nothing
    assert bool((silence == silence[0, 0, 0]).all())
    more = read(audio, parts, 5)
    assert torch.equal(more[2], third) and torch.isfinite(torch.stack(more)).all()


def test_stretches_of_a_film() -> None:
    video = get_modality("video")
    parts = film(25)
    size = video.measure(parts)
    assert (size.width, size.height, size.frames, size.seconds) == (64, 48, 125, 25.0)
    assert [video.count_spans(size, n) for n in (1, 2, 3, 9)] == [1, 2, 3, 3]
    clips = video.decode_spans(parts, {}, 3)
    times = [second for clip in clips for second in clip.seconds]
    assert times == sorted(times) and times[0] == 0 and times[-1] == 24.0
    assert np.allclose(np.diff(times), 24 / 14, atol=0.21)
    values = read(video, parts, 3)
    assert [tuple(v.shape) for v in values] == [(15, 3, SIDE, SIDE)] * 3
    brightness = [float(v.mean()) for v in values]
    assert brightness == sorted(brightness) and brightness[0] < brightness[2]


def test_other_modalities_take_one_span() -> None:
    for name, modality in all_modalities().items():
        if name in ("image", "audio", "video"):
            continue
        assert modality.count_spans(MediaSize(9999, 9999, 9999, 9999.0), 9) == 1
        with pytest.raises(SampleError, match=f"{name} takes one span"):
            modality.read_spans({}, {}, spans=2, train=False, rng=RNG)


def test_a_broken_header_has_no_size() -> None:
    for name in ("image", "audio", "video"):
        modality = get_modality(name)
        role = next(iter(modality.required_parts))
        with pytest.raises(SampleError):
            modality.measure({role: Part("x", b"this is not media.")})


def test_media_of_a_modality_share_its_spans() -> None:
    wide = ("image", MediaSize(2000, 2000))
    modalities = all_modalities()
    assert share_spans([wide], {"image": 5}, modalities) == [5]
    assert share_spans([wide, wide], {"image": 5}, modalities) == [1, 1]
    assert share_spans([wide, wide], {"image": 10}, modalities) == [5, 5]
    long = ("audio", MediaSize(seconds=60))
    assert share_spans([wide, long, wide], {"audio": 4}, modalities) == [1, 4, 1]
