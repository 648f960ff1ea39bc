"""Videos: which frames are taken, from which containers, and how they are cut."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media_samples import every_frame, sound, tone, video

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.transforms.crops import CLIP_MEAN, CLIP_STD
from onellm_dist.modalities.video import VideoClip, compute_clip_starts

VIDEO = get_modality("video")
RNG = np.random.default_rng(0)


def decode(data: bytes) -> VideoClip:
    clip: VideoClip = VIDEO.decode({"video": Part("mp4", data)}, {})
    return clip


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {"bf": "3", "g": "12"}),
        ("mp4", "libx264", {"bf": "2", "g": "250"}),
        ("mp4", "libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1"}),
        (
            "mp4",
            "libx265",
            {"preset": "ultrafast", "x265-params": "bframes=3:keyint=20:log-level=none"},
        ),
        ("mp4", "mpeg4", {"bf": "2", "g": "15"}),
        ("mov", "mjpeg", {}),
        ("matroska", "libx264", {"bf": "2", "g": "20"}),
        ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
        ("avi", "mpeg4", {"bf": "2"}),
        ("avi", "libx264", {"bf": "2"}),
        ("mpegts", "libx264", {"bf": "2"}),
    ],
)
def test_the_frames_are_the_ones_a_full_decode_gives(
    container: str, codec: str, options: dict[str, str]
) -> None:
    data = video(container, codec, frames=70, fps=20, options=options)
    clip, frames = decode(data), every_frame(data)
    # 3.5 s: clips start every 0.625 s, at frame 12.5 -> 13 and so on
    for i, index in enumerate((0, 13, 25, 38, 50)):
        assert np.array_equal(clip.frames[i], frames[index])
        assert clip.seconds[i] == pytest.approx(index / 20)


@given(
    st.integers(1, 5000),
    st.sampled_from([10.0, 24.0, 25.0, 30000 / 1001, 24000 / 1001, 60.0, 12.5]),
)
def test_clip_starts_follow_pytorchvideos_formula(total: int, rate: float) -> None:
    duration = float(total) / rate
    spread = Fraction(max(duration - 1, 0)) / 4
    expected = [min(math.ceil(rate * float(spread * i)), total - 1) for i in range(5)]
    assert compute_clip_starts(total, rate) == expected
    assert expected == sorted(expected)


def test_a_films_range_is_not_that_of_the_film_before() -> None:
    """Motion JPEG has 256 levels, H.264 usually 220: a converter that is kept mixes them up."""
    data = video("mov", "mjpeg")
    assert np.array_equal(decode(data).frames[0], every_frame(data)[0])
    data = video("mp4", "libx264")
    assert np.array_equal(decode(data).frames[0], every_frame(data)[0])


def test_a_short_video_repeats_its_first_frame() -> None:
    data = video(frames=6)
    clip = decode(data)
    assert all(np.array_equal(f, every_frame(data)[0]) for f in clip.frames)
    assert VIDEO.transform(clip, train=True, rng=RNG).shape == (15, 3, 224, 224)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_a_display_matrix_is_followed(rotation: int) -> None:
    data = video(frames=5, rotation=rotation)
    stored = every_frame(data)[0]
    assert np.array_equal(decode(data).frames[0], np.rot90(stored, rotation // 90))


def expected_crops(frame: np.ndarray) -> torch.Tensor:
    """By torch alone: scale everything, normalise, then cut."""
    height, width = frame.shape[:2]
    size = (int(height / width * 224), 224) if width < height else (224, int(width / height * 224))
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)[0]
    pixels = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[
        :, None, None
    ]
    spare = max(size) - 224
    starts = [0, math.ceil(spare / 2), spare]
    return torch.stack(
        [pixels[:, s : s + 224] if height > width else pixels[:, :, s : s + 224] for s in starts]
    )


@pytest.mark.parametrize("shape", [(96, 161), (161, 96), (240, 426), (300, 300), (1080, 1920)])
def test_three_crops_of_each_frame_clip_by_clip(shape: tuple[int, int]) -> None:
    frames = tuple(
        np.random.default_rng(i).integers(0, 256, (*shape, 3)).astype(np.uint8) for i in range(5)
    )
    got = VIDEO.transform(VideoClip(frames, (0.0,) * 5), train=False, rng=RNG)
    for i in (0, 3):
        torch.testing.assert_close(
            got[i * 3 : i * 3 + 3], expected_crops(frames[i]), atol=2e-5, rtol=0
        )


def test_crops_of_a_square_video_are_identical_and_of_a_wide_one_not() -> None:
    square = VIDEO.transform(decode(video(size=(96, 96))), train=False, rng=RNG)
    wide = VIDEO.transform(decode(video(size=(192, 96))), train=False, rng=RNG)
    assert torch.equal(square[6], square[8]) and not torch.equal(wide[6], wide[8])


def test_what_is_no_video_is_refused() -> None:
    whole = video(frames=40)
    playlist = (
        b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    )
    for data in (
        b"",
        b"not a video",
        whole[: len(whole) // 2],
        playlist,
        sound(tone(), 16000).data,
    ):
        with pytest.raises(SampleError) as error:
            decode(data)
        assert ".mp4" in error.value.what and error.value.do


def test_a_sliver_is_refused() -> None:
    with pytest.raises(SampleError, match="pixels"):
        decode(video(size=(1000, 32), frames=3))


def test_frames_that_cannot_be_decoded_are_not_replaced() -> None:
    data = bytearray(video(frames=60, codec="mjpeg", container="mov"))
    # every frame of an MJPEG starts with its own magic: wipe those from the 20th on
    at, starts = 0, []
    while (at := data.find(b"\xff\xd8\xff", at)) >= 0:
        starts.append(at)
        at += 3
    for start, end in itertools.pairwise(starts[20:]):
        data[start:end] = bytes(end - start)
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode(bytes(data))
