"""Which names a dataset may have, checked in this one place: datasets, shards, keys, parts.

Names come from manifests, tars and command lines, which other people may have written. A name that
leads out of its folder, or that a reader would take for another, is refused before anything is
read or written under it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.hidden_files import has_hidden_part

_DATASET = re.compile(r"\w[\w.-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")
# One expression for a shard's path, because a manifest may list 41,400 of them: components that
# are neither empty nor . or .., and are UTF-8 without control characters.
_COMPONENT = r"(?!\.{1,2}(?:/|$))[^/\x00-\x1f\x7f\ud800-\udfff]+"
_SHARD_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*(?<=.\.tar)")
_LONGEST = 255
"""Bytes of a name that file systems hold."""
# webdataset 1.0.2, tariterators.base_plus_ext: the key runs to the first dot of the base name.
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
# webdataset 1.0.2, tar_file_iterator's skip_meta: members of such names belong to no sample.
_META = re.compile(r"__[^/]*__($|/)")


def check_name(name: str) -> None:
    """Check that a dataset can have this name.

    Raises:
        UsageError: it has characters that a name cannot have.
    """
    if not isinstance(name, str) or not _DATASET.fullmatch(name) or len(name.encode()) > _LONGEST:
        raise UsageError(
            f"dataset name {name!r:.120} has characters other than letters, digits and ._-, or "
            "begins with . or -, or is too long.",
            "it is part of the id of every sample, and of file names.",
            "choose another.",
        )


def is_split_name(split: str) -> bool:
    """Check that a writer can use this name of a split in the name of a tar."""
    return _SPLIT.fullmatch(split) is not None


def find_bad_shard_path(paths: Iterable[str]) -> str | None:
    """Return the first path that no shard of a dataset can have; None: all can.

    A shard lies inside its dataset's folder: the path is relative, has no component `..`, and is
    the path of a `.tar`.
    """
    return next((path for path in paths if not _SHARD_PATH.fullmatch(path)), None)


def find_outside_link(root: Path, paths: Iterable[str]) -> str | None:
    """Return the first path that leads out of `root` through a link; None: none does."""
    top = root.resolve()
    return next(
        (path for path in paths if not (root / path).resolve().is_relative_to(top)),
        None,
    )


def split_name(name: str) -> tuple[str, str] | None:
    """Split the name of a tar member into key and lower-cased extension, by WebDataset's rule.

    Returns:
        None if the member belongs to no sample: it is hidden, or has no key or no extension.
    """
    if _META.match(name) or has_hidden_part(name):
        return None
    match = _MEMBER.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def find_key_fault(key: str) -> str | None:
    """Return why a WebDataset tar cannot hold this key; None: it can."""
    if not _is_printable(key):
        return "it has control characters or is not UTF-8"
    if key.startswith("__"):
        return "it begins with __, which readers skip"
    if any(not part or part[0] == "." for part in key.split("/")):
        return "a component is empty or begins with a dot"
    return None


def find_stored_key_fault(key: str) -> str | None:
    """Return why a key of an existing tar is refused; None: it is accepted.

    The rule is that of `find_key_fault`, but for what other tools write and readers take as it is:
    a leading `./` (`tar -C folder .`) or `/` (`tar -P`), and `//` and `/./` between components. No
    reader makes a path of a key.
    """
    return find_key_fault("/".join(part for part in key.split("/") if part not in ("", ".")))


def check_names(where: str, key: str, parts: Collection[str]) -> None:
    """Check that a WebDataset tar can hold this key with these extensions.

    Raises:
        SampleError: it cannot; `where` begins the message.
    """
    if not parts:
        raise SampleError(
            f"{where} has no parts.", "a sample of a tar is its files.", "give it at least one."
        )
    fault = find_key_fault(key)
    if fault is not None:
        raise SampleError(
            f"{where}: a WebDataset tar cannot hold this key: {fault}.",
            "readers would skip it or read another name.",
            "use plain relative names.",
        )
    for extension in parts:
        if (
            not extension
            or split_name(f"{key}.{extension}") != (key, extension)
            or extension.startswith(("_", "."))
            or not _is_printable(extension)
        ):
            raise SampleError(
                f"{where}, part {extension!r}: a reader of the tar would not find it by this name.",
                "a key has no dot behind its last slash and no component that begins with a dot; "
                "an extension is lower-case and starts with a letter or digit.",
                "rename it (a dot in a key may become _).",
            )


def _is_printable(text: str) -> bool:
    """Check for UTF-8 (which a file name need not be) without control characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return _CONTROL.search(text) is None
