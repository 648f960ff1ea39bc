"""What a file is that cannot be read as a checkpoint: words for people, by its first bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HEAD = 1024
"""Bytes that are looked at."""
_UNPACK = "unpack it and give what is inside."
_AGAIN = "download the file itself."
_FROM_OTHERS = (
    "load it with the program that wrote it and save it as safetensors (transformers 4 reads it "
    "with from_tf=True or from_flax=True), or download the safetensors of the same model."
)


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        what: words that complete "it is ...".
        do: what the user can do about it.
    """

    what: str
    do: str


_BY_START: tuple[tuple[bytes, FileKind], ...] = (
    (
        b"version https://git-lfs.github.com/",
        FileKind(
            "a Git LFS pointer of some bytes: the weights were never fetched",
            "run `git lfs pull` there, or download with `hf download`.",
        ),
    ),
    (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19",
        FileKind(
            "a file of torch.save as before torch 1.6 (no zip archive)",
            "save it again: torch.save(torch.load(FILE, weights_only=True), NEW_FILE).",
        ),
    ),
    (b"GGUF", FileKind("a GGUF file", "convert it with `onellm convert gguf`.")),
    *(
        (
            magic,
            FileKind(
                "a GGML file of llama.cpp from before GGUF",
                "convert it to GGUF with an old llama.cpp, or download another file.",
            ),
        )
        for magic in (b"lmgg", b"fmgg", b"tjgg")
    ),
    (b"\x1f\x8b", FileKind("compressed with gzip", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", FileKind("compressed with zstd", _UNPACK)),
    (b"\xfd7zXZ\x00", FileKind("compressed with xz", _UNPACK)),
    (b"BZh", FileKind("compressed with bzip2", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", FileKind("a 7z archive", _UNPACK)),
    (b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file (TensorFlow, Keras)", _FROM_OTHERS)),
    (b"\x93NUMPY", FileKind("a NumPy array", "give a checkpoint of named tensors.")),
)
_BY_SUFFIX = {
    ".onnx": FileKind("an ONNX graph", _FROM_OTHERS),
    ".msgpack": FileKind("a Flax checkpoint", _FROM_OTHERS),
    ".h5": FileKind("a TensorFlow checkpoint", _FROM_OTHERS),
    ".incomplete": FileKind("a download that was not finished", _AGAIN),
    ".part": FileKind("a download that was not finished", _AGAIN),
    ".crdownload": FileKind("a download that was not finished", _AGAIN),
}


def identify_file(path: Path) -> FileKind | None:
    """What a file is, if it is not a checkpoint that can be read; None: nothing is known of it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if size == 0:
        return FileKind("empty: the download or copy never began", _AGAIN)
    if not any(head):
        return FileKind("made of zeros: a download or copy was not finished", _AGAIN)
    if (text := head.lstrip().lower()).startswith((b"<!doctype html", b"<html")):
        return FileKind("an HTML page (a login, or an error), saved under this name", _AGAIN)
    if text.startswith((b"<?xml", b"<error")):
        return FileKind("an XML text (an error of a store), saved under this name", _AGAIN)
    for start, kind in _BY_START:
        if head.startswith(start):
            return kind
    if path.suffix in _BY_SUFFIX:
        return _BY_SUFFIX[path.suffix]
    if head[257:262] == b"ustar":
        return FileKind("a tar archive", _UNPACK)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return FileKind(
            "a pickle, not an archive of torch.save",
            "save the tensors with safetensors or torch.save; pickled objects are never loaded.",
        )
    if text.startswith(b"{"):
        return FileKind("a JSON text (an error of a server?), saved under this name", _AGAIN)
    return None


def looks_like_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a JSON header and that header's brace."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        return False
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40
