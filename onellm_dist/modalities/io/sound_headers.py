"""What the headers of uncompressed sound files say about their length: WAV, AIFF and AU."""

from __future__ import annotations

import struct

_UNKNOWN = 2_000_000_000
"""Bytes from which on a stated length is a placeholder: a program that writes into a pipe cannot
know the length, and states the largest number that it can (ffmpeg 2^32 - 1, sox 2^31 - 1)."""


def measure_data(data: bytes) -> tuple[int, int]:
    """Compare the sound that the header states with the sound that is there.

    Returns:
        Bytes of sound that the header states, and bytes of them that the file has; equal if the
        header does not say, or the format is another one.
    """
    found = _find_sound(data)
    if found is None:
        return 1, 1
    start, stated = found
    present = len(data) - start
    if stated >= _UNKNOWN or stated <= present:
        return 1, 1
    return stated, max(present, 0)


def is_unfinished(data: bytes) -> bool:
    """Check for a WAV whose header states no sound, as a writer into a pipe leaves it.

    A WAV without sound states the size of the file in its RIFF header. One that was never finished
    states 0, or the size of the header alone, and has more bytes than that.
    """
    if data[:4] != b"RIFF":
        return False
    found = _find_sound(data)
    if found is None or found[1] != 0:
        return False
    return int.from_bytes(data[4:8], "little") + 8 <= found[0] < len(data)


def _find_sound(data: bytes) -> tuple[int, int] | None:
    """Where the sound begins, and how many bytes of it the header states; None: unknown."""
    kind = data[:4]
    if kind == b".snd" and len(data) >= 12:
        start, size = struct.unpack(">II", data[4:12])
        return start, size
    order = {b"RIFF": "<", b"RIFX": ">", b"RF64": "<", b"FORM": ">"}.get(kind)
    if order is None:
        return None
    wanted, at, long_size = (b"SSND" if kind == b"FORM" else b"data"), 12, 0
    while at + 8 <= len(data):
        name, size = data[at : at + 4], struct.unpack(order + "I", data[at + 4 : at + 8])[0]
        if name == b"ds64" and at + 24 <= len(data):
            long_size = struct.unpack("<Q", data[at + 16 : at + 24])[0]
        if name == wanted:
            is_long = kind == b"RF64" and size == 0xFFFFFFFF and long_size
            return at + 8, long_size if is_long else size
        at += 8 + size + size % 2
    return None
