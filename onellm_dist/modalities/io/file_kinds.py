"""What a file is that is not a medium of the kind that its name says: words for people."""

from __future__ import annotations

_HEAD = 1024
_STARTS = (
    (b"version https://git-lfs.github.com/", "a Git LFS pointer: run `git lfs pull`"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"BZh", "compressed with bzip2"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"8BPS", "a Photoshop document"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"GIF8", "a GIF picture"),
    (b"wvpk", "a WavPack audio file"),
    (b"TTA1", "a TTA audio file"),
    (b"MThd", "a MIDI file"),
    (b"#EXTM3U", "a playlist"),
    (b"ID3", "an MP3 audio file"),
)
_BRANDS = {
    b"heic": "a HEIC picture: convert it to JPEG",
    b"heix": "a HEIC picture: convert it to JPEG",
    b"mif1": "a HEIF picture: convert it to JPEG",
    b"avif": "an AVIF picture",
}
"""What the first brand of an ISO container says."""


def describe_damage(data: bytes, read: str) -> str | None:
    """Say what a file is that its decoder does not take; None: nothing is known of it.

    Args:
        data: the file.
        read: the end of the names of the kinds that the decoder reads, such as `picture`.
    """
    kind = identify(data)
    if kind is None:
        return None
    if kind.endswith(read):
        return f"it begins like {kind}, and what follows is damaged"
    return f"it is {kind}"


def identify(data: bytes) -> str | None:
    """Say what a file is by its first bytes; None: nothing is known of it."""
    head = data[:_HEAD]
    if not any(head):
        return "empty" if not data else "made of zeros: a download or copy was not finished"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a login, or an error), saved under this name"
    if b"<svg" in text:
        return "an SVG drawing: render it to PNG"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML text (an error of a store), saved under this name"
    if text.startswith((b"{", b"[")):
        return "a JSON text (an error of a server?), saved under this name"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((what for start, what in _STARTS if head.startswith(start)), None)
