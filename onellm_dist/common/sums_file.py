r"""The lines of a SHA256SUMS file, in every form that common tools write.

    <64 hex digits>  name            sha256sum (` *name`: read in binary mode)
    \<64 hex digits>  na\\me\n       the same, with backslash, newline and return escaped
    SHA256 (name) = <64 hex digits>  sha256sum --tag, BSD's sha256, shasum --tag
    SHA256(name)= <64 hex digits>    openssl dgst (also SHA2-256)

Blank lines and comments (`#`) are skipped. Everything else is an error: a damaged line must not
pass as one that says nothing.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_HEX = "(?:[0-9a-f]{64}|[0-9A-F]{64})"
"""A digest, in one case: a letter of the other one is a flipped bit."""
_GNU = re.compile(rf"(?P<hex>{_HEX}) [ *](?P<name>.+)")
_BSD = re.compile(rf"SHA256 \((?P<name>.+)\) = (?P<hex>{_HEX})")
_OPENSSL = re.compile(rf"SHA(?:2-)?256\((?P<name>.+)\)= (?P<hex>{_HEX})")
_DAMAGED_ENTRY = re.compile(r"#[0-9a-fA-F]{63} [ *].+")
"""An entry whose first digit became `#`: a `c` with a flipped bit."""
_ESCAPE = re.compile(r"\\(.?)")
_ESCAPES = {"\\": "\\", "n": "\n", "r": "\r"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def parse_sums(text: str) -> dict[str, str]:
    """Name -> SHA-256 in lower case of the files inside the folder.

    Names are relative, without `./`. Entries of absolute paths, and of paths that lead out, are
    left out.

    Args:
        text: the content of a SHA256SUMS.

    Raises:
        ValueError: a line is malformed, or two lines contradict each other.
    """
    found: dict[str, str] = {}
    for number, ended in enumerate(text.split("\n"), 1):
        line = ended.removesuffix("\r")
        if not line.strip() or (line.startswith("#") and not _DAMAGED_ENTRY.fullmatch(line)):
            continue
        digest, written = _parse_line(line, number)
        name = normalise_name(written)
        if name is None:
            continue
        if found.setdefault(name, digest) != digest:
            raise ValueError(f"line {number} has another checksum of {name!r} than one before")
    return found


def format_line(digest: str, name: str) -> str:
    """A line as `sha256sum` writes it, with its end.

    Args:
        digest: SHA-256 in hex.
        name: the file's name.
    """
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "" if escaped == name else "\\"
    return f"{mark}{digest}  {escaped}\n"


def _parse_line(line: str, number: int) -> tuple[str, str]:
    """(digest, name) of a line."""
    is_escaped = line.startswith("\\")
    body = line[1:] if is_escaped else line
    match = _GNU.fullmatch(body) or _BSD.fullmatch(body) or _OPENSSL.fullmatch(body)
    if match is None or _CONTROL.search(match["name"]):
        raise ValueError(f"line {number} is {line[:80]!r}")
    name = match["name"]
    if is_escaped:
        try:
            name = _ESCAPE.sub(lambda escape: _ESCAPES[escape[1]], name)
        except KeyError:
            raise ValueError(f"line {number} is {line[:80]!r}") from None
    return match["hex"].lower(), name


def normalise_name(name: str) -> str | None:
    """A recorded name without `./` and the like; None if it leads out of the folder.

    Args:
        name: the name, with `/` between folders.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    return str(path)
