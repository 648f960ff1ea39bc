"""Sound files as people have them: padding, cut ends, other codecs, pipes, several streams."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import tracemalloc
from collections.abc import Callable

import av
import numpy as np
import pytest
import soundfile
import torch
from av.audio.stream import AudioStream
from hypothesis import given, settings
from hypothesis import strategies as st
from media_samples import sound_by_ffmpeg, tone
from signal_mutations import written

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.audio import Sound
from onellm_dist.modalities.io.damage import collect_damage
from onellm_dist.modalities.io.sound_headers import measure_mp3
from onellm_dist.modalities.io.sounds import AUDIO_EXTENSIONS, measure_sound
from onellm_dist.shards.format.names import find_readable_modalities, split_file_name

AUDIO = get_modality("audio")
RATE = 16000


def read(data: bytes, extension: str = "wav") -> tuple[Sound, list[str]]:
    """The sound of a file, and what was noted about it."""
    with collect_damage() as damage:
        sound: Sound = AUDIO.decode({"audio": Part(extension, data)}, {})
    return sound, damage


def seconds(sound: Sound) -> float:
    return len(sound.wave) / sound.rate


def pitch(sound: Sound) -> float:
    spectrum = np.abs(np.fft.rfft(sound.wave * np.hanning(len(sound.wave))))
    return float(spectrum.argmax() / seconds(sound))


def wav(form: str = "WAV", subtype: str = "PCM_16", length: float = 3.0) -> bytes:
    return written(tone(RATE, length), RATE, form, subtype)


MP3 = sound_by_ffmpeg(tone(44100, 3.0), 44100, "mp3", "libmp3lame")


@pytest.mark.parametrize(
    "data",
    [
        MP3 + bytes(2000),
        MP3 + b"TAG" + b"title".ljust(125, b"\0"),
        MP3 + b"APETAGEX" + bytes(300),
        bytes(3000) + MP3,
        b"ID3\x04\0\0\0\0\x01\0" + bytes(128) + MP3,
        MP3[:-150],
    ],
    ids=["zeros", "tag", "another tag", "zeros before", "id3", "cut"],
)
def test_what_lies_around_an_mp3_costs_nothing(data: bytes) -> None:
    sound, _ = read(data, "mp3")
    assert seconds(sound) == pytest.approx(3.0, abs=0.08)
    assert pitch(sound) == pytest.approx(440, abs=2)


def test_noise_inside_an_mp3_costs_what_it_hits() -> None:
    noise = np.random.default_rng(0).bytes(700)
    sound, damage = read(MP3[: len(MP3) // 2] + noise + MP3[len(MP3) // 2 :], "mp3")
    assert 2.8 < seconds(sound) <= 3.01 and pitch(sound) == pytest.approx(440, abs=2)
    assert len(damage) == 1 and "lost" in damage[0] and ".mp3" in damage[0]


@pytest.mark.parametrize("form", ["FLAC", "WAV", "AIFF", "AU"])
@given(st.floats(0.05, 0.99))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_a_cut_file_is_read_to_its_end_or_refused(form: str, kept: float) -> None:
    whole, none = read(wav(form))
    assert none == []
    data = wav(form)[: int(kept * len(wav(form)))]
    if kept < 0.7:
        with pytest.raises(SampleError, match="lost"):
            read(data)
        return
    if kept < 0.8:
        return  # near the limit: a codec's frames decide
    sound, damage = read(data)
    assert len(damage) == 1 and "lost" in damage[0]
    assert seconds(sound) == pytest.approx(3 * kept, abs=0.3)
    assert np.array_equal(sound.wave, whole.wave[: len(sound.wave)])


@pytest.mark.parametrize("before", [b"", b"ID3\x04\0\0\0\0\x01\0" + bytes(128)], ids=["", "id3"])
def test_a_cut_mp3_lacks_what_its_counter_states(before: bytes) -> None:
    """LAME counts its frames in the first one; a download that stopped lacks the last ones."""
    assert measure_mp3(before + MP3) == pytest.approx(3.0, abs=1e-3)
    assert read(before + MP3, "mp3")[1] == []
    sound, damage = read(before + MP3[: int(0.85 * len(MP3))], "mp3")
    assert len(damage) == 1 and "lost" in damage[0]
    assert seconds(sound) == pytest.approx(2.55, abs=0.15)
    with pytest.raises(SampleError, match=r"1\.\d+ s of 3\.\d+ s of sound are lost"):
        read(before + MP3[: len(MP3) // 2], "mp3")
    at = MP3.index(b"Info") if b"Info" in MP3[:200] else MP3.index(b"Xing")
    uncounted = MP3[:at] + bytes(120) + MP3[at + 120 :]
    assert measure_mp3(uncounted) is None
    assert read(uncounted[: len(MP3) // 2], "mp3")[1] == [], "nothing says how long it was"


@pytest.mark.parametrize("data", [b"", b"ID3", b"\xff\xfb", b"\xff\xfb\x90\x00" + bytes(40)])
def test_a_broken_counter_states_nothing(data: bytes) -> None:
    assert measure_mp3(data) is None


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_pages_of_an_ogg_that_are_damaged_cost_what_they_hold(subtype: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 9 * RATE).astype(np.float32)
    data = written(noise, RATE, "OGG", subtype)
    assert read(data)[1] == [] and read(data + bytes(3000))[1] == []
    half = len(data) // 2
    for damaged in (
        data[:half] + bytes(500) + data[half + 500 :],
        data[:half] + b"x" * 500 + data[half:],
        data[:half] + bytes([data[half] ^ 4]) + data[half + 1 :],
    ):
        sound, damage = read(damaged)
        assert 7 < seconds(sound) < 8.5 and len(damage) == 1 and "lost" in damage[0]
    sound, damage = read(data[: int(0.9 * len(data))])
    assert 7 < seconds(sound) < 8.5 and "its end is cut off" in damage[0]


@pytest.mark.parametrize("codec", ["adpcm_ima_wav", "adpcm_swf", "adpcm_yamaha", "g726", "aac"])
def test_codecs_in_wav_that_libsndfile_does_not_know(codec: str) -> None:
    rate = 8000 if codec == "g726" else 22050
    sound, _ = read(sound_by_ffmpeg(tone(rate, 2.0), rate, "wav", codec))
    assert sound.rate == rate and seconds(sound) == pytest.approx(2.0, abs=0.1)
    assert pitch(sound) == pytest.approx(440, abs=3)


def unfinished_wav(riff: int, size: int) -> Callable[[], bytes]:
    def make() -> bytes:
        data = bytearray(wav())
        struct.pack_into("<I", data, 4, riff)
        struct.pack_into("<I", data, data.index(b"data") + 4, size)
        return bytes(data)

    return make


def unfinished_aiff(size: int, frames: int) -> Callable[[], bytes]:
    def make() -> bytes:
        data = bytearray(wav("AIFF"))
        struct.pack_into(">I", data, 4, size)
        struct.pack_into(">I", data, 22, frames)
        struct.pack_into(">I", data, data.index(b"SSND") + 4, size)
        return bytes(data)

    return make


def unfinished_au(size: int) -> Callable[[], bytes]:
    def make() -> bytes:
        data = bytearray(wav("AU"))
        struct.pack_into(">I", data, 8, size)
        return bytes(data)

    return make


def unfinished_rf64() -> bytes:
    data = bytearray(wav("RF64"))
    at = data.index(b"ds64") + 8
    data[at : at + 24] = bytes(24)
    return bytes(data)


@pytest.mark.parametrize(
    "make",
    [
        unfinished_wav(0, 0),
        unfinished_wav(36, 0),
        unfinished_wav(2**32 - 1, 2**32 - 1),
        unfinished_wav(2**32 - 1, 0),
        unfinished_wav(2**31 - 1, 2**31 - 37),
        unfinished_wav(2_000_000_036, 2_000_000_000),
        unfinished_aiff(0, 0),
        unfinished_aiff(8, 0),
        unfinished_aiff(2**31 - 1, 2**31 - 1),
        unfinished_au(0),
        unfinished_au(2**31 - 1),
        unfinished_au(2**32 - 1),
        unfinished_rf64,
    ],
)
def test_headers_of_pipes(make: Callable[[], bytes]) -> None:
    sound, damage = read(make())
    assert damage == [] and np.array_equal(sound.wave, read(wav())[0].wave)


@pytest.mark.parametrize("form", ["WAV", "AIFF"])
def test_a_file_without_sound_is_not_read_as_noise(form: str) -> None:
    order, kind = ("<", b"data") if form == "WAV" else (">", b"SSND")
    data = wav(form)
    start = data.index(kind) + 8
    empty = bytearray(data[:start] + (b"" if form == "WAV" else bytes(8)))
    struct.pack_into(order + "I", empty, start - 4, len(empty) - start)
    if form == "AIFF":
        struct.pack_into(">I", empty, 22, 0)
    empty += b"LIST" + struct.pack(order + "I", 3000) + b"INFO" + bytes(2996)
    struct.pack_into(order + "I", empty, 4, len(empty) - 8)
    sound, _ = read(bytes(empty))
    assert len(sound.wave) == 0
    with pytest.raises(SampleError, match="25 ms"):
        AUDIO.make_value(sound, train=False, rng=np.random.default_rng(0))


def several_sounds(marked: int | None, comment: int | None = None) -> bytes:
    """A film's sounds of 300, 600 and 1200 Hz, of which one may be the default or a commentary."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        streams = [out.add_stream("flac", rate=RATE, layout="mono") for _ in range(3)]
        for number, stream in enumerate(streams):
            assert isinstance(stream, AudioStream)
            marks = (number == marked) * av.stream.Disposition.default.value
            marks += (number == comment) * av.stream.Disposition.comment.value
            stream.disposition = marks  # type: ignore[assignment]  # PyAV 15 wants a number
        for number, stream in enumerate(streams):
            wave = (tone(RATE, 1.0, 300 * 2**number) * 32000).astype(np.int16)
            for start in range(0, RATE, 4000):
                frame = av.AudioFrame.from_ndarray(
                    wave[None, start : start + 4000], format="s16", layout="mono"
                )
                frame.sample_rate, frame.pts = RATE, start
                assert isinstance(stream, AudioStream)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("marked", "comment", "chosen"), [(0, None, 300), (1, None, 600), (2, 0, 1200), (0, 0, 600)]
)
def test_the_sound_that_a_player_plays_is_chosen(
    marked: int, comment: int | None, chosen: float
) -> None:
    sound, _ = read(several_sounds(marked, comment), "mka")
    assert pitch(sound) == pytest.approx(chosen, abs=3)


@pytest.mark.parametrize("rate", [0, 1, 99, 1_000_001, 2**31 - 1, 2**32 - 1])
def test_a_damaged_rate_takes_no_memory(rate: int) -> None:
    data = bytearray(wav())
    struct.pack_into("<I", data, 24, rate)
    tracemalloc.start()
    with pytest.raises(SampleError):
        read(bytes(data))
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("channels", [7, 8, 9, 33, 256])
@pytest.mark.parametrize("form", ["WAV", "W64"])
def test_many_channels(channels: int, form: str) -> None:
    """PyAV 18 reads beyond a frame's planes from 8 channels on: W64 is read by FFmpeg."""
    waves = np.stack([tone(8000, 0.1, 300 + c) for c in range(channels)], 1)
    sound, _ = read(written(waves, 8000, form, "FLOAT"), form.lower())
    np.testing.assert_array_equal(sound.wave, waves[:, 0])


def test_a_contradicting_header_is_not_read_by_the_lenient_decoder() -> None:
    data = bytearray(wav(subtype="FLOAT"))
    struct.pack_into("<H", data, 22, 33)  # channels; a frame still has 4 bytes
    struct.pack_into("<I", data, data.index(b"data") + 4, 2)
    with pytest.raises(SampleError):
        AUDIO.make_value(read(bytes(data))[0], train=False, rng=np.random.default_rng(0))


@given(st.floats(-30, 38), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_loud_floats_are_kept_or_refused_and_never_nan(power: float, seed: int) -> None:
    wave = np.random.default_rng(seed).uniform(-1, 1, 1600) * 10**power
    wave[0] = 10**power
    data = written(wave.astype(np.float32), RATE, "WAV", "FLOAT")
    if power > 2.001:
        with pytest.raises(SampleError, match="full scale"):
            read(data)
        return
    if power < 1.999:
        sound = read(data)[0]
        assert sound.wave.max() == np.float32(10**power)  # nothing is clipped
        value = AUDIO.make_value(sound, train=True, rng=np.random.default_rng(seed))
        assert torch.isfinite(value).all()


def test_damaged_files_print_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """libsndfile seeks before the start of some damaged AIFFs, from a callback."""
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    data = wav("AIFF", length=0.2)
    for at in range(4, 60):
        for value in (0, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] = value
            with contextlib.suppress(SampleError):
                read(bytes(damaged))
    assert printed == []


def test_names_follow_the_decoders() -> None:
    assert {"aiff", "aif", "aifc", "au", "caf", "w64", "wma"} <= set(AUDIO_EXTENSIONS)
    for extension in AUDIO_EXTENSIONS:
        assert split_file_name(f"a.{extension.upper()}") == ("a", extension)
        assert find_readable_modalities({extension}) == ("audio",)


@pytest.mark.parametrize("form", ["AIFF", "CAF", "W64", "AU", "RF64"])
def test_containers_of_uncompressed_sound_are_equal(form: str) -> None:
    np.testing.assert_array_equal(read(wav(form))[0].wave, read(wav())[0].wave)


@pytest.mark.parametrize("seconds", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("rate", [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000])
def test_the_padding_of_an_encoder_is_no_lost_sound(rate: int, seconds: float) -> None:
    wave = tone(rate, seconds)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="MP3", subtype="MPEG_LAYER_III")
    for data in (buffer.getvalue(), sound_by_ffmpeg(wave, rate, "mp3", "libmp3lame")):
        assert read(data, "mp3")[1] == []


def test_the_length_of_a_quiet_sound_is_counted() -> None:
    """FFmpeg guesses it from the bit rate of the beginning, and says 55 s here."""
    wave = tone(RATE, 20.0)
    wave[: RATE * 19] = 0
    data = sound_by_ffmpeg(wave, RATE, "adts", "aac")
    assert measure_sound(Part("aac", data)) == pytest.approx(20, abs=0.3)
