"""Sound from audio files and media containers: libsndfile first, then FFmpeg.

A file that libsndfile cannot read to its end is given to FFmpeg, which knows more codecs (AAC and
G.726 in WAV) and passes over packets that it cannot decode. What is missing then is noted (see
`io.damage`).
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import av
import numpy as np
import soundfile

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.io.containers import open_media
from onellm_dist.modalities.io.damage import note_damage
from onellm_dist.modalities.io.sound_headers import (
    complete_header,
    is_cut_ogg,
    measure_data,
    measure_mp3,
)
from onellm_dist.modalities.library_faults import require_library
from onellm_dist.modalities.limits import LIMITS, check_count, check_rate

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet

AUDIO_EXTENSIONS = (
    *("wav", "flac", "ogg", "mp3", "opus", "m4a", "aac"),
    *("aiff", "aif", "aifc", "au", "caf", "w64", "oga", "weba", "mka", "mp2", "wma", "amr", "ac3"),
)
"""What the two libraries read: these are the names that sources look for."""
_SOUNDFILE_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd")
_TIMED = {"mov", "mp4", "m4a", "matroska", "flac", "ogg", "asf", "caf", "w64"}
"""Containers of FFmpeg whose stated duration is counted, not guessed from a bit rate."""
_RAW = {"mp3", "aac", "ac3", "amr"}
"""Formats without a container: what cannot be decoded at either end is padding or a tag."""
_UNCOMPRESSED = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")
_TOLERANCE = 0.1
"""Seconds by which a stated duration may differ from the sound: encoders add and cut a frame."""
_BLOCK = 1 << 20
"""Numbers (frames times channels) that libsndfile reads at a time from a file of many channels."""
_UNKNOWN_FRAMES = 1 << 62
"""libsndfile states 2^63 - 1 frames for a stream whose header does not say how many it has."""
_PLANES = 8
"""Channels from which on PyAV 18 reads beyond a frame's planes, and the process crashes."""
_LARGEST_UNFRAMED = 4 << 20
"""Bytes of AAC in a WAV that are decoded as one packet."""


def read_sound(part: Part, seconds: float) -> tuple[np.ndarray, int]:
    """Read the beginning of the first channel.

    Args:
        part: the file, in any format of `AUDIO_EXTENSIONS`; its bytes decide which.
        seconds: how much to read at most.

    Returns:
        [N] fp32, full scale at 1, and its rate in Hz.

    Raises:
        SampleError: neither library can read it, its rate or its number of channels is beyond the
            limits, or too much of it is damaged.
    """
    if part.data[:4] not in _SOUNDFILE_MAGIC:
        return _read_ffmpeg(part, seconds)
    try:
        return _read_soundfile(Part(part.extension, complete_header(part.data)), seconds)
    except SampleError:
        raise
    except Exception as error:  # LibsndfileError; ValueError or RuntimeError on broken headers
        require_library(error)
        first = error
    try:
        return _read_ffmpeg(part, seconds, known_codecs=True)
    except SampleError as second:
        # Printed objects have an address that differs each time.
        said = str(first).rpartition(">: ")[2] or type(first).__name__
        raise SampleError(f"{second.what} (libsndfile: {said})", second.why, second.do) from first


def measure_sound(part: Part) -> float:
    """Read the length of a sound in seconds: what its header states, else that of its packets.

    (FFmpeg guesses the length of raw AAC and of MP3 without a Xing header from the bit rate of the
    beginning, which is many times too long where that is quiet.)

    Raises:
        SampleError: neither library can open it.
    """
    if part.data.startswith(_SOUNDFILE_MAGIC):
        try:
            with soundfile.SoundFile(_QuietBytes(complete_header(part.data))) as file:
                if file.frames < _UNKNOWN_FRAMES:
                    return float(file.frames / file.samplerate)
        except soundfile.SoundFileError:
            pass  # FFmpeg may know it
    stated = measure_mp3(part.data)
    if stated is not None:
        return stated
    with open_media(part, "audio") as container:
        stream = choose_audio_stream(container)
        if _TIMED & set(container.format.name.split(",")):
            if stream.duration and stream.time_base:
                return float(stream.duration * stream.time_base)
            if container.duration:
                return container.duration / av.time_base
        return _sum_packets(container, stream)


def _sum_packets(container: InputContainer, stream: AudioStream) -> float:
    """Seconds of a stream's packets, up to the first that cannot be read."""
    seconds = 0.0
    try:
        for packet in container.demux(stream):
            seconds += _get_seconds(packet)
    except av.FFmpegError:
        pass  # the rest is cut off or damaged, and is not heard either
    return seconds


class _QuietBytes(io.BytesIO):
    """Bytes in which a place before the start is not gone to.

    libsndfile asks for such places in damaged files, and an exception in its callback prints a
    traceback that nothing can catch.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Seek as BytesIO does; stay where the place is invalid."""
        try:
            return super().seek(offset, whence)
        except ValueError:
            return self.tell()


def _read_soundfile(part: Part, seconds: float) -> tuple[np.ndarray, int]:
    name = f".{part.extension}"
    with soundfile.SoundFile(_QuietBytes(part.data)) as file:
        rate, channels = int(file.samplerate), int(file.channels)
        check_rate(LIMITS["audio"], rate, name)
        check_count(LIMITS["audio"], "channels", channels, name)
        wanted = min(int(seconds * rate), file.frames)
        if wanted * channels <= _BLOCK:
            wave = file.read(wanted, dtype="float32", always_2d=True)[:, 0]
        else:
            wave = _read_blocks(file, wanted, _BLOCK // channels)
        is_exact = file.subtype.startswith(_UNCOMPRESSED)
    declared, present = measure_data(part.data)
    expected = min(int(seconds * rate), round(len(wave) * declared / max(present, 1)))
    if file.frames < _UNKNOWN_FRAMES:
        expected = max(wanted, expected)
    missing = expected - len(wave)
    if len(wave) and missing > (0 if is_exact else _TOLERANCE * rate):
        _note_missing(name, missing / rate, len(wave) / rate, "they are damaged or cut off")
    if is_cut_ogg(part.data) and len(wave) < int(seconds * rate):
        note_damage(f"{name}: its end is cut off; how much is lost is not known", 0.0)
    return np.ascontiguousarray(wave), rate


def _read_blocks(file: soundfile.SoundFile, wanted: int, block: int) -> np.ndarray:
    """[<= wanted] the first channel, without all the others in memory at once."""
    blocks: list[np.ndarray] = []
    have = 0
    while have < wanted:
        read = file.read(min(block, wanted - have), dtype="float32", always_2d=True)[:, 0].copy()
        if not len(read):
            break
        blocks.append(read)
        have += len(read)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def _note_missing(name: str, missing: float, have: float, why: str) -> None:
    total = missing + have
    lost = f"{missing:.3f} s of {total:.3f} s of sound are lost"
    note_damage(f"{name}: {lost}: {why}", missing / total)


@dataclass
class _DecodedSound:
    """What FFmpeg decoded so far.

    Attributes:
        blocks: the first channel, [n] fp32 each.
        have: samples in them.
        lost: seconds of packets that could not be decoded, with decoded ones behind them.
        pending: the same of the packets since the last decoded one.
        junk: bytes of the latter.
    """

    rate: int
    blocks: list[np.ndarray] = field(default_factory=list)
    have: int = 0
    lost: float = 0.0
    pending: float = 0.0
    junk: int = 0

    def add(self, frames: list[AudioFrame]) -> None:
        for frame in frames:
            if not self.have:
                self.rate = frame.sample_rate
            elif frame.sample_rate != self.rate:  # noise that was taken for a frame
                self.lost += frame.samples / frame.sample_rate
                continue
            channels = frame.layout.nb_channels
            planar = channels < _PLANES
            # Sample format only: rate and layout stay. A resampler takes one kind of frame.
            for plane in av.AudioResampler(format="fltp" if planar else "flt").resample(frame):
                values = plane.to_ndarray()[0]
                self.blocks.append(values if planar else values[::channels].copy())
                self.have += len(self.blocks[-1])


def _read_ffmpeg(
    part: Part, seconds: float, *, known_codecs: bool = False
) -> tuple[np.ndarray, int]:
    """Read a sound with FFmpeg, see `read_sound`.

    Args:
        part: as there.
        seconds: as there.
        known_codecs: whether libsndfile knows the container, and refused the file.
    """
    name = f".{part.extension}"
    with open_media(part, "audio") as container:
        stream = choose_audio_stream(container)
        if known_codecs and stream.codec_context.name.startswith("pcm_"):
            # libsndfile reads all of these: its header contradicts itself, which FFmpeg ignores.
            raise ValueError("its header contradicts itself")
        check_rate(LIMITS["audio"], stream.rate, name)
        check_count(LIMITS["audio"], "channels", stream.channels, name)
        formats = set(container.format.name.split(","))
        sound = _decode_packets(container, stream, seconds, raw=bool(formats & _RAW))
        stated = None
        if formats & _TIMED and stream.duration and stream.time_base:
            stated = float(stream.duration * stream.time_base)
        elif "mp3" in formats:
            stated = measure_mp3(part.data)
        has_unframed = "wav" in formats and stream.codec_context.name == "aac"
    if has_unframed and sound.lost + sound.pending > 0:
        sound = _decode_unframed(part) or sound
    if not sound.have:
        raise SampleError(
            f"{name} ({len(part.data)} bytes) has no sound that can be decoded",
            "the sample has no usable sound.",
            "download or encode it again, or drop the sample.",
        )
    check_rate(LIMITS["audio"], sound.rate, name)
    have = sound.have / sound.rate
    short = 0.0 if stated is None else min(stated, seconds) - have - _TOLERANCE
    lost = max(sound.lost, short + _TOLERANCE if short > 0 else 0.0)
    if lost > 0 and have < seconds + lost:
        _note_missing(name, lost, have, "its packets cannot be decoded, or are not there")
    if sound.junk and have < seconds:
        note_damage(f"{name}: {sound.junk} bytes at its end are not sound", 0.0)
    wave = np.concatenate(sound.blocks)[: int(seconds * sound.rate)]
    return wave.astype(np.float32, copy=False), sound.rate


def choose_audio_stream(container: InputContainer) -> AudioStream:
    """Choose the sound that a player would play.

    The first stream that is marked as the default one, and is not a commentary or description for
    people who cannot see or hear; if there is none, the first that FFmpeg can decode.
    """
    streams = [s for s in container.streams.audio if s.codec_context is not None and s.rate]
    streams = streams or list(container.streams.audio)
    marks = av.stream.Disposition
    special = (
        marks.comment
        | marks.hearing_impaired
        | marks.visual_impaired
        | marks.dependent
        | marks.karaoke
        | marks.lyrics
    )
    plain = [s for s in streams if not s.disposition & special] or streams
    return next((s for s in plain if s.disposition & marks.default), plain[0])


def _decode_packets(
    container: InputContainer, stream: AudioStream, seconds: float, *, raw: bool
) -> _DecodedSound:
    """Decode until there is enough, and pass over packets that cannot be decoded.

    Args:
        container: an open container.
        stream: one of its streams.
        seconds: how much is enough.
        raw: whether undecodable packets before the first sound count as padding.
    """
    sound = _DecodedSound(int(stream.rate))
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                sound.pending += _get_seconds(packet)
                sound.junk += packet.size
                continue
            if frames:
                if sound.have or not raw:
                    sound.lost += sound.pending
                sound.pending = 0.0
                sound.junk = 0
                sound.add(frames)
            if sound.have >= seconds * sound.rate:
                break
    except av.FFmpegError:
        if not sound.have:
            raise  # the container itself is broken
    if not raw:
        sound.lost += sound.pending
        sound.pending = 0.0
        sound.junk = 0
    return sound


def _get_seconds(packet: Packet[AudioStream]) -> float:
    if packet.duration and packet.time_base:
        return float(packet.duration * packet.time_base)
    return 0.0


def _decode_unframed(part: Part) -> _DecodedSound | None:
    """Decode AAC in a WAV that has no frame headers; None: this does not help.

    FFmpeg cuts such a stream into packets of a fixed size. The decoder finds the ends of frames by
    itself if it gets all of them in one packet.
    """
    with open_media(part, "audio") as container:
        stream = choose_audio_stream(container)
        data = b"".join(bytes(packet) for packet in container.demux(stream))
    if len(data) > _LARGEST_UNFRAMED:
        return None
    with open_media(part, "audio") as container:
        context = choose_audio_stream(container).codec_context
        sound = _DecodedSound(int(context.sample_rate))
        try:
            sound.add(context.decode(av.Packet(data)))
        except av.FFmpegError:
            return None
    return sound


def encode_wave(wave: np.ndarray, rate: int) -> Part:
    """Encode a sound, [N] fp32, as a file without loss."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="WAV", subtype="FLOAT")
    return Part("wav", buffer.getvalue())


def make_wave(array: np.ndarray) -> np.ndarray:
    """The first channel of a sound that a program holds, as `read_sound` gives that of a file.

    Args:
        array: [N], [channels, N] or [N, channels]; floats, or integers of 16 or 32 bits whose full
            scale is the largest of their type.

    Returns:
        [N] fp32, full scale at 1.

    Raises:
        SampleError: the array is not a sound.
    """
    scale = {"i2": 2.0**15, "i4": 2.0**31}.get(f"{array.dtype.kind}{array.dtype.itemsize}", 1.0)
    if array.ndim not in (1, 2) or not (array.dtype.kind == "f" or scale > 1) or not array.size:
        raise SampleError(
            f"an array of {array.dtype} and shape {array.shape} is not a sound",
            "sounds are [samples] or [channels, samples] of floats, int16 or int32.",
            "convert it: floats have full scale at 1.",
        )
    wave = array if array.ndim == 1 else array[0] if len(array) < array.shape[1] else array[:, 0]
    return (wave / scale).astype(np.float32)
