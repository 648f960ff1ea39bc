"""What sound files say about their length.

The headers of WAV, AIFF and AU, the pages of Ogg, and the frame counter of MP3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_UNKNOWN = 2_000_000_000
"""Bytes from which on a stated length is a placeholder: a program that writes into a pipe cannot
know the length, and states the largest number that it can (ffmpeg 2^32 - 1, sox 2^31 - 1)."""
_SSND_FIELDS = 8
"""Bytes of an AIFF's sound chunk before the sound itself: offset and block size."""


@dataclass(frozen=True)
class _SoundChunk:
    """The chunk that holds the sound.

    Attributes:
        start: where its content begins.
        stated: bytes of content that the header states.
        order: byte order of the file, for `struct`.
        long_size: where a 64-bit length lies that replaces the chunk's own (RF64); 0: nowhere.
    """

    start: int
    stated: int
    order: str
    long_size: int = 0


def measure_data(data: bytes) -> tuple[int, int]:
    """Compare the sound that the header states with the sound that is there.

    Returns:
        Bytes of sound that the header states, and bytes of them that the file has; 1 and 1 if none
        are missing, the header does not say, or the format is another one.
    """
    chunk = _find_sound(data)
    if chunk is None:
        return 1, 1
    present = len(data) - chunk.start
    if chunk.stated >= _UNKNOWN or chunk.stated <= present:
        return 1, 1
    return chunk.stated, max(present, 0)


def complete_header(data: bytes) -> bytes:
    """Write the length into a header that was never finished.

    A program that writes into a pipe cannot go back to fill in the length. libsndfile takes its
    placeholders for no sound if they are 0 (WAV, AU, AIFF), or 2^31 - 1 in an AU.

    Returns:
        The bytes with the true length, or as they are if the header states one.
    """
    chunk = _find_sound(data)
    if chunk is None or chunk.start >= len(data):
        return data
    kind, size = data[:4], len(data) - chunk.start
    empty = _SSND_FIELDS if kind == b"FORM" else 0
    if chunk.stated > empty and not (kind == b".snd" and _UNKNOWN <= chunk.stated < 2**32 - 1):
        return data
    if kind != b".snd" and _is_chunks(data, chunk.start + chunk.stated, chunk.order):
        return data  # there is no sound, only what describes it
    out = bytearray(data)
    if kind == b".snd":
        struct.pack_into(">I", out, 8, size)
        return bytes(out)
    if chunk.long_size:
        struct.pack_into("<QQ", out, chunk.long_size - 8, len(data) - 8, size)
        return bytes(out)
    struct.pack_into(chunk.order + "I", out, 4, len(data) - 8)
    struct.pack_into(chunk.order + "I", out, chunk.start - 4, size)
    return bytes(out)


def is_cut_ogg(data: bytes) -> bool:
    """Check for an Ogg whose last page is not complete (RFC 3533, section 6)."""
    at = data.rfind(b"OggS")
    if data[:4] != b"OggS" or at + 27 > len(data):
        return data[:4] == b"OggS"
    lengths = data[at + 27 : at + 27 + data[at + 26]]
    return at + 27 + data[at + 26] + sum(lengths) > len(data)


def measure_mp3(data: bytes) -> float | None:
    """Compute the seconds that an MP3 states in its first frame (LAME's Xing or Info header).

    Returns:
        None: it states nothing, or does not begin with a frame or an ID3 tag.
    """
    at = 0
    while data[at : at + 3] == b"ID3" and at + 10 <= len(data):
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 127
        at += 10 + size
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 255 or head[1] >> 5 != 7:
        return None
    version, layer, rate = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 2 & 3
    if layer != 1 or version == 1 or rate == 3:
        return None
    is_mono, is_first = head[3] >> 6 == 3, version == 3
    side = (17 if is_mono else 32) if is_first else (9 if is_mono else 17)
    at += 4 + side + (0 if head[1] & 1 else 2)
    if data[at : at + 4] not in (b"Xing", b"Info") or at + 12 > len(data):
        return None
    flags, frames = struct.unpack_from(">II", data, at + 4)
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    if not flags & 1:
        return None
    length = 1152 if is_first else 576
    sound: int = frames * length - _count_padding(data, at + 8, flags, length)
    return max(0, sound) / hertz


def _count_padding(data: bytes, at: int, flags: int, length: int) -> int:
    """Samples of an MP3 that are not sound: what the encoder put before and behind it.

    Args:
        data: the file.
        at: where the fields behind the flags of its Xing header begin.
        flags: which fields there are: frames, bytes, table of contents, quality.
        length: samples per frame; without a LAME tag, four frames are taken for padding.
    """
    at += sum(size for bit, size in ((1, 4), (2, 4), (4, 100), (8, 4)) if flags & bit)
    if data[at : at + 3] not in (b"LAM", b"Lav") or at + 24 > len(data):
        return 4 * length
    first, middle, last = data[at + 21 : at + 24]
    return (first << 4 | middle >> 4) + ((middle & 15) << 8 | last)


def _is_chunks(data: bytes, at: int, order: str) -> bool:
    """Check that from here to the end there are chunks (or nothing), and no sound."""
    while at + 8 <= len(data):
        if not all(32 <= byte < 127 for byte in data[at : at + 4]):
            return False
        size = struct.unpack_from(order + "I", data, at + 4)[0]
        at += 8 + size + size % 2
    return len(data) - 8 < at <= len(data) + 1


def _find_sound(data: bytes) -> _SoundChunk | None:
    """Find the sound of a WAV, AIFF or AU; None: it is another format, or has none."""
    kind = data[:4]
    if kind == b".snd" and len(data) >= 12:
        start, size = struct.unpack(">II", data[4:12])
        return _SoundChunk(start, size, ">")
    order = {b"RIFF": "<", b"RIFX": ">", b"RF64": "<", b"FORM": ">"}.get(kind)
    if order is None:
        return None
    wanted, at, long_size = (b"SSND" if kind == b"FORM" else b"data"), 12, 0
    while at + 8 <= len(data):
        name, size = data[at : at + 4], struct.unpack_from(order + "I", data, at + 4)[0]
        if name == b"ds64" and at + 24 <= len(data):
            long_size = at + 16
        if name == wanted:
            if kind == b"RF64" and size == 2**32 - 1 and long_size:
                size = struct.unpack_from("<Q", data, long_size)[0]
                return _SoundChunk(at + 8, size, order, long_size)
            return _SoundChunk(at + 8, size, order)
        at += 8 + size + size % 2
    return None
