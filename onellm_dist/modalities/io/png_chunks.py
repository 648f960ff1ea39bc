"""Leaving out the chunks of a PNG that no pixel depends on."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_XMP = b"XML:com.adobe.xmp\0\0"
"""Begin of an uncompressed XMP text, which may state the orientation."""
_LARGEST_XMP = 1 << 20


def _list_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, begin and end of each chunk; the last one may be cut short."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        yield data[at + 4 : at + 8], at, end
        at = end


def drop_metadata(data: bytes) -> bytes:
    """Return a PNG with its pixels, palette, transparency and orientation alone.

    Texts, colour profiles and animation control are left out, whatever their size and state. The
    first frame of an animation is the picture that stays.

    Args:
        data: a PNG, possibly damaged; what is damaged in the chunks that stay is left as it is.
    """
    kept = [SIGNATURE]
    for kind, begin, end in _list_chunks(data):
        if kind in _PIXELS or _states_orientation(data, kind, begin, end):
            kept.append(data[begin:end])
    return b"".join(kept)


def read_significant_bits(data: bytes) -> tuple[int, ...]:
    """Read sBIT: how many bits of each sample a PNG calls significant; () if it says nothing."""
    for kind, begin, end in _list_chunks(data):
        if kind in (b"IDAT", b"PLTE"):
            break
        checksum = struct.pack(">I", zlib.crc32(data[begin + 4 : end - 4]))
        if kind == b"sBIT" and 13 <= end - begin <= 16 and data[end - 4 : end] == checksum:
            return tuple(data[begin + 8 : end - 4])
    return ()


def _states_orientation(data: bytes, kind: bytes, begin: int, end: int) -> bool:
    """Whether a chunk is undamaged EXIF or XMP of an ordinary size."""
    if kind == b"iTXt":
        if data[begin + 8 : begin + 8 + len(_XMP)] != _XMP or end - begin > _LARGEST_XMP:
            return False
    elif kind != b"eXIf":
        return False
    checksum = data[end - 4 : end]
    return checksum == struct.pack(">I", zlib.crc32(data[begin + 4 : end - 4]))
