"""Films as people have them: covers, several streams, wrong rates, mirrored, cut short, damaged."""

from __future__ import annotations

import io
import multiprocessing
import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from media_samples import every_frame, picture, video
from PIL import Image

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.io.damage import collect_damage
from onellm_dist.modalities.video import VideoClip
from onellm_dist.shards.build.prepare import prepare_sample
from onellm_dist.shards.build.settings import OPTIONS, BuildSettings
from onellm_dist.shards.sources.base import RawSample

VIDEO = get_modality("video")
SIZE = (64, 48)


def decode(data: bytes, extension: str = "mp4") -> VideoClip:
    clip: VideoClip = VIDEO.decode({"video": Part(extension, data)}, {})
    return clip


def brightness(clip: VideoClip) -> list[int]:
    return [round(float(f.mean())) for f in clip.frames]


def grey(number: int, total: int, width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), 20 + 215 * number // max(1, total - 1), np.uint8)


def box(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", 8 + len(payload)) + kind + payload


def add_cover(mp4: bytes) -> bytes:
    """What mutagen writes for a cover: moov/udta/meta/ilst/covr, first in moov."""
    red = picture(Image.new("RGB", (80, 80), "red"), "JPEG").data
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0) + red))
    handler = box(b"hdlr", b"\0" * 8 + b"mdirappl" + b"\0" * 9)
    meta = box(b"udta", box(b"meta", b"\0" * 4 + handler + box(b"ilst", cover)))
    at = mp4.rindex(b"moov") - 4  # the last box, as FFmpeg writes it
    return mp4[:at] + box(b"moov", meta + mp4[at + 8 :])


def several(
    container: str, streams: Sequence[tuple[int, int, bool]], *, sound: bool = False
) -> bytes:
    """Films in one file, each of some frames of one grey: (frames, grey, is default)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        if sound:
            tone = out.add_stream("aac", rate=48000, layout="mono")
            assert isinstance(tone, AudioStream)
        films = []
        for _, _, is_default in streams:
            film = out.add_stream("mpeg4", rate=20)
            assert isinstance(film, VideoStream)
            film.width, film.height = SIZE
            film.pix_fmt = "yuv420p"
            marks = av.stream.Disposition.default if is_default else av.stream.Disposition(0)
            film.disposition = marks.value  # type: ignore[assignment]  # PyAV 15 wants a number
            films.append(film)
        if sound:
            silence = np.zeros((1, 1024), np.float32)
            for start in range(0, 48000, 1024):
                frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 48000, start
                for packet in tone.encode(frame):
                    out.mux(packet)
            for packet in tone.encode():
                out.mux(packet)
        for film, (frames, level, _) in zip(films, streams, strict=True):
            shown = np.full((SIZE[1], SIZE[0], 3), level, np.uint8)
            for _ in range(frames):
                for packet in film.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")):
                    out.mux(packet)
            for packet in film.encode():
                out.mux(packet)
    return buffer.getvalue()


def test_a_cover_is_not_the_film() -> None:
    plain = video(frames=40, size=SIZE, draw=grey)
    with_cover = add_cover(plain)
    with av.open(io.BytesIO(with_cover)) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    for shown, expected in zip(decode(with_cover).frames, decode(plain).frames, strict=True):
        assert np.array_equal(shown, expected)


def test_sound_with_a_cover_is_no_film() -> None:
    for data in (several("mp4", [], sound=True), add_cover(several("mp4", [], sound=True))):
        with pytest.raises(SampleError, match="no video stream"):
            decode(data)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ([(1, 40, True), (40, 200, True)], 200),
        ([(20, 40, True), (60, 200, True)], 200),
        ([(60, 40, False), (30, 200, True)], 200),
        ([(30, 40, True), (30, 200, True)], 40),
    ],
)
def test_of_several_films_the_default_one_then_the_longest_is_read(
    container: str, streams: list[tuple[int, int, bool]], expected: int
) -> None:
    data = several(container, streams, sound=True)
    assert brightness(decode(data)) == pytest.approx([expected] * 5, abs=4)


def timed(times: Sequence[int], stated: int) -> bytes:
    """A Matroska file of frames at these milliseconds, whose header states another rate."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        film = out.add_stream("mpeg4", rate=stated)
        assert isinstance(film, VideoStream)
        film.width, film.height, film.pix_fmt = *SIZE, "yuv420p"
        film.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(grey(i, len(times), *SIZE), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in film.encode(frame):
                out.mux(packet)
        for packet in film.encode():
            out.mux(packet)
    return buffer.getvalue()


def test_presentation_times_are_believed_where_they_contradict_the_stated_rate() -> None:
    clip = decode(timed([200 * i for i in range(50)], stated=50), "mkv")  # 5 a second for 10 s
    assert clip.seconds == pytest.approx([0, 2.4, 4.6, 6.8, 9.0], abs=0.3)
    assert brightness(clip) == sorted(brightness(clip)) and brightness(clip)[-1] > 200


def test_a_stated_rate_that_fits_is_kept_to_the_bit() -> None:
    data = video(frames=70, fps=20, size=SIZE)
    assert decode(data).seconds == (0.0, 13 / 20, 25 / 20, 38 / 20, 50 / 20)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [(False, False), (True, False), (False, True)])
def test_turned_and_mirrored_films_are_shown_as_players_do(
    turn: int, mirror: tuple[bool, bool]
) -> None:
    plain = video(frames=3, size=(96, 64))
    corner = every_frame(plain)[0].copy()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        film = out.add_stream("libx264", rate=20, options={"crf": "0"})
        assert isinstance(film, VideoStream)
        film.width, film.height, film.pix_fmt = 96, 64, "yuv444p"
        if not hasattr(film, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a display matrix")
        film.set_display_rotation(turn, hflip=mirror[0], vflip=mirror[1])
        for packet in [
            *film.encode(av.VideoFrame.from_ndarray(corner, format="rgb24")),
            *film.encode(),
        ]:
            out.mux(packet)
    expected = np.rot90(corner, turn // 90)  # counter-clockwise, then mirrored
    expected = expected[:: -1 if mirror[1] else 1, :: -1 if mirror[0] else 1]
    shown = decode(buffer.getvalue()).frames[0]
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected.astype(int)).mean() < 3


def cut(folder: Path, container: str, share: float) -> bytes:
    """The first bytes of a film of 100 frames; an mp4 has its index at its beginning."""
    muxing = {"movflags": "faststart"} if container == "mp4" else {}
    path = folder / "film"
    with av.open(str(path), "w", format=container, options=muxing) as out:
        film = out.add_stream("mpeg4", rate=20, options={"g": "10"})
        assert isinstance(film, VideoStream)
        film.width, film.height, film.pix_fmt = *SIZE, "yuv420p"
        film.bit_rate = 2_000_000
        noise = np.random.default_rng(0)
        for i in range(100):
            frame = grey(i, 100, *SIZE) // 2 + noise.integers(0, 60, (48, 64, 3), dtype=np.uint8)
            for packet in film.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                out.mux(packet)
        for packet in film.encode():
            out.mux(packet)
    data = path.read_bytes()
    return data[: int(len(data) * share)]


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_film_that_is_cut_short_is_used_if_enough_is_left(tmp_path: Path, container: str) -> None:
    with collect_damage() as damage:
        decode(cut(tmp_path, container, 1.0))
    assert damage == []
    with collect_damage() as damage:
        clip = decode(cut(tmp_path, container, 0.9))
    assert brightness(clip) == sorted(brightness(clip)) and "missing" in damage[0]
    with pytest.raises(SampleError, match=r"missing|not readable"):
        decode(cut(tmp_path, container, 0.5))


def wipe(data: bytes, first: int, last: int) -> bytes:
    """An MJPEG film without the content of some frames."""
    changed, at, starts = bytearray(data), 0, []
    while (at := data.find(b"\xff\xd8\xff", at)) >= 0:
        starts.append(at)
        at += 3
    for number in range(first, last):
        end = starts[number + 1] - 8  # before the header of the next chunk
        changed[starts[number] : end] = bytes(end - starts[number])
    return bytes(changed)


@pytest.mark.parametrize(("container", "extension"), [("mov", "mov"), ("avi", "avi")])
def test_a_damaged_frame_is_replaced_by_the_one_before_it(container: str, extension: str) -> None:
    data = video(container, "mjpeg", frames=61, fps=20, size=SIZE, draw=grey)
    whole = decode(data, extension)  # frames 0, 11, 21, 31, 41
    with collect_damage() as damage:
        clip = decode(wipe(data, 21, 23), extension)
    assert "frame 21 of 61" in damage[0]
    assert np.array_equal(clip.frames[2], every_frame(data)[20])
    for i in (0, 1, 3, 4):
        assert np.array_equal(clip.frames[i], whole.frames[i])


def test_a_large_frame_is_refused_from_its_header() -> None:
    data = bytearray(video(frames=3, size=SIZE, codec="mjpeg", container="mov"))
    for frame in range(data.count(b"\xff\xc0")):
        at = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xc0"][frame]
        data[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    with pytest.raises(SampleError):
        decode(bytes(data), "mov")


def test_a_library_that_does_not_fit_is_no_fault_of_the_sample(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyAV 14.0 had no `rotation`: every film was called bad."""
    monkeypatch.setattr("onellm_dist.modalities.io.frames.make_upright_rgb", lambda f: f.not_there)
    (tmp_path / "x.mp4").write_bytes(video(frames=5, size=SIZE))
    options = {name: option.default for name, option in OPTIONS.items()}
    settings = BuildSettings(**{**options, "name": "n", "licence": ""})
    with pytest.raises(OneLLMError, match="not_there") as error:
        prepare_sample(
            RawSample("x", "x", {"mp4": tmp_path / "x.mp4"}, "a caption"), ("video",), settings
        )
    assert not isinstance(error.value, SampleError) and "the installed av " in error.value.what


def edit_list(mp4: bytes, share: float, start: int) -> bytes:
    """A film trimmed as telephones do: an edit shows a share of it, from this time on."""
    at = mp4.index(b"elst") + 12
    (length,) = struct.unpack_from(">I", mp4, at)
    return mp4[:at] + struct.pack(">Ii", int(length * share), start) + mp4[at + 8 :]


@pytest.mark.parametrize("start", [0, 10240])
def test_what_an_edit_list_leaves_out_is_not_missing(tmp_path: Path, start: int) -> None:
    """FFmpeg hands out the packets of the edit alone; the header counts all that are stored."""
    whole = cut(tmp_path, "mp4", 1.0)
    with collect_damage() as damage:
        clip = decode(edit_list(whole, 0.5, start))
    assert damage == []
    first = start // 512
    shown = [every_frame(whole)[first + round(s * 20)].mean() for s in clip.seconds]
    assert brightness(clip) == pytest.approx(shown, abs=2)
    with collect_damage() as damage:
        decode(edit_list(whole, 0.98, 0)[: int(len(whole) * 0.9)])
    assert "8% of the film is missing" in damage[0]
    with pytest.raises(SampleError, match="missing"):
        decode(edit_list(whole, 0.9, 0)[: int(len(whole) * 0.5)])


def test_a_forked_process_decodes_after_its_parent_converted_frames() -> None:
    """PyAV's own converter of colours has threads, and a fork has none of them."""
    data = video()
    every_frame(data)  # as a program that uses PyAV beside us
    here = brightness(decode(data))
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if brightness(decode(data)) == here else 1)
    )
    process.start()
    process.join(30)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert not alive
    assert process.exitcode == 0
