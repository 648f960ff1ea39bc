"""Sounds: formats, rates, the filter bank against the reference, masks, what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_samples import sound, sound_by_ffmpeg, tone, video
from safetensors.torch import load_file

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.audio import DEVIATION, MEAN, Sound
from onellm_dist.modalities.transforms.fbank import compute_fbank
from onellm_dist.modalities.transforms.resample import resample

PARITY = load_file(Path(__file__).parents[1] / "fixtures/parity_preprocess/preprocess.safetensors")
AUDIO = get_modality("audio")
SILENCE = (0 - MEAN) / (2 * DEVIATION)
"""What a masked or missing frame becomes."""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pitch(wave: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(spectrum.argmax() * rate / len(wave))


def test_the_filter_bank_is_the_references() -> None:
    part = sound(PARITY["audio0.wave"][0].numpy(), 16000, subtype="FLOAT")
    got = AUDIO.transform(AUDIO.decode({"audio": part}, {}), train=False, rng=rng())
    torch.testing.assert_close(got, PARITY["audio0.fbank_1x128x1024"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "PCM_U8"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("AIFF", "PCM_16"),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_of_libsndfile(form: str, subtype: str, channels: int) -> None:
    left = tone(32000, 0.5, 440)
    wave = left if channels == 1 else np.stack([left, tone(32000, 0.5, 2000)], 1)
    got = AUDIO.decode({"audio": sound(wave, 32000, form, subtype)}, {})
    assert got.rate == 32000 and got.wave.dtype == np.float32
    assert pitch(got.wave, 32000) == pytest.approx(440, abs=4)  # the first channel
    assert np.abs(got.wave).max() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("mp3", "libmp3lame", 44100),
        ("mp3", "libmp3lame", 22050),
        ("ipod", "aac", 44100),
        ("adts", "aac", 16000),
        ("ogg", "libopus", 48000),
    ],
)
def test_formats_of_ffmpeg_whatever_they_are_called(container: str, codec: str, rate: int) -> None:
    got = AUDIO.decode(
        {"audio": Part("wav", sound_by_ffmpeg(tone(rate, 1.0), rate, container, codec))}, {}
    )
    assert got.rate == rate and len(got.wave) == pytest.approx(rate, rel=0.1)
    assert pitch(got.wave, rate) == pytest.approx(440, abs=4)


def test_mp3_sounds_as_its_wav() -> None:
    wave = tone(16000, 2.0, 700)
    features = [
        AUDIO.transform(AUDIO.decode({"audio": part}, {}), train=False, rng=rng())[
            0, :, 20:150
        ].mean(1)
        for part in (
            sound(wave, 16000),
            Part("mp3", sound_by_ffmpeg(wave, 16000, "mp3", "libmp3lame")),
        )
    ]
    loud = features[0] > features[0].max() - 0.5
    torch.testing.assert_close(features[0][loud], features[1][loud], atol=0.05, rtol=0)


@pytest.mark.parametrize("seconds", [0.025, 1.0, 10.0, 10.3, 45.0])
def test_every_length_has_the_value_shape(seconds: float) -> None:
    raw = AUDIO.decode({"audio": sound(tone(16000, seconds), 16000)}, {})
    got = AUDIO.transform(raw, train=False, rng=rng())
    assert got.shape == (1, 128, 1024) and got.dtype == torch.float32
    frames = min(1024, 1 + (int(16000 * seconds) - 400) // 160)
    assert (got[..., frames:] == torch.tensor(SILENCE, dtype=torch.float32)).all()
    assert (got[..., frames - 1] != torch.tensor(SILENCE, dtype=torch.float32)).any()


def test_what_is_left_unread_of_a_long_file_would_change_nothing() -> None:
    """The reference reads the whole file. The first 10.3 s give the same features, even if later
    sound has an offset.
    """
    wave = np.concatenate([tone(44100, 11, 500), 0.5 + tone(44100, 9, 900)]).astype(np.float32)
    got = AUDIO.transform(
        AUDIO.decode({"audio": sound(wave, 44100, subtype="FLOAT")}, {}), train=False, rng=rng()
    )
    everything = resample(wave, 44100, 16000)
    whole = compute_fbank(everything - everything.mean())[:1024]
    expected = ((whole - MEAN) / (2 * DEVIATION)).t()[None]
    loud = expected > -0.5  # in bins of next to no energy the rounding of the offset shows
    torch.testing.assert_close(got[loud], expected[loud], atol=1e-3, rtol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000, 96000, 44101])
def test_resampling_keeps_a_tone_and_its_height(rate: int) -> None:
    got = resample(tone(rate, 1.0, 440), rate, 16000)
    assert got.dtype == np.float32 and len(got) == 16000
    middle = slice(800, -800)
    assert np.abs(got[middle] - tone(16000, 1.0, 440)[middle]).max() < 4e-3


def direct_resample(signal: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Torchaudio's definition, sample by sample: a windowed sinc of 6 zero crossings, cut off at
    0.99 of the lower Nyquist frequency.
    """
    cutoff = min(rate, target) * 0.99
    out = []
    for j in range(math.ceil(target * len(signal) / rate)):
        at = np.clip((np.arange(len(signal)) / rate - j / target) * cutoff, -6, 6)
        out.append((signal * np.sinc(at) * np.cos(at * np.pi / 12) ** 2).sum() * cutoff / rate)
    return np.array(out)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 300), st.integers(2, 300), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_resampling_is_torchaudios_definition(
    rate: int, target: int, length: int, seed: int
) -> None:
    signal = rng(seed).normal(size=length)
    np.testing.assert_allclose(
        resample(signal, rate, target),
        direct_resample(signal, rate, target) if rate != target else signal,
        atol=1e-9,
    )


def test_training_zeroes_one_mel_band_and_one_time_band() -> None:
    raw = AUDIO.decode(
        {"audio": sound(rng(1).normal(0, 0.1, 16000 * 11).astype(np.float32), 16000)}, {}
    )
    plain = AUDIO.transform(raw, train=False, rng=rng())
    widths = []
    for seed in range(40):
        got = AUDIO.transform(raw, train=True, rng=rng(seed))[0]
        changed = got != plain[0]
        assert torch.allclose(got[changed], torch.tensor(SILENCE, dtype=torch.float32))
        mels, times = changed.all(1).nonzero()[:, 0], changed.all(0).nonzero()[:, 0]
        widths.append((len(mels), len(times)))
        for band in (mels, times):
            assert len(band) == 0 or len(band) == band[-1] - band[0] + 1
        outside = torch.ones_like(changed)
        outside[mels], outside[:, times] = False, False
        assert not changed[outside].any()
    mel_widths, time_widths = zip(*widths, strict=True)
    assert max(mel_widths) < 48 and max(time_widths) < 192
    assert np.mean(mel_widths) == pytest.approx(24, abs=8) and np.mean(
        time_widths
    ) == pytest.approx(96, abs=32)


def test_training_is_a_function_of_the_generator_alone() -> None:
    raw = Sound(tone(), 16000)
    assert torch.equal(
        AUDIO.transform(raw, train=True, rng=rng(3)), AUDIO.transform(raw, train=True, rng=rng(3))
    )


def test_what_is_no_sound_is_refused() -> None:
    good = sound(tone(), 16000)
    nan = tone()
    nan[500] = np.nan
    for data in (
        b"",
        b"RIFF",
        good.data[:20],
        b"\0" * 5000,
        b"ID3" + b"\0" * 300,
        video(frames=3),
        sound(nan, 16000, subtype="FLOAT").data,
    ):
        with pytest.raises(SampleError) as error:
            AUDIO.decode({"audio": Part("wav", data)}, {})
        assert ".wav" in error.value.what and error.value.do


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_less_than_a_window_is_refused(samples: int) -> None:
    with pytest.raises(SampleError, match="25 ms"):
        AUDIO.transform(Sound(tone()[:samples], 16000), train=False, rng=rng())
