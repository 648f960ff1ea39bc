"""Finding the files that annotations name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.named_files import find_named_file, is_file


def resolve_below(inputs: Path, path: Path | str) -> Path:
    """Resolve the path of an option: relative to the input folder unless it is absolute."""
    return Path(path) if Path(path).is_absolute() else inputs / str(path)


def require_file(
    inputs: Path, path: Path | str | None, usual: Iterable[str], what: str, option: str
) -> str:
    """Find a file that a source cannot do without.

    Args:
        inputs: the input folder.
        path: the user's choice.
        usual: the usual names, of which the first that exists is taken if there is no choice.
        what: what the file is, for the error.
        option: the option that names it.

    Returns:
        Its name relative to `inputs`, or absolute.

    Raises:
        UsageError: there is no such file.
    """
    names = [str(path)] if path is not None else list(usual)
    found = next((n for n in names if resolve_below(inputs, n).is_file()), None)
    if found is None:
        raise UsageError(
            f"{inputs}: no {' or '.join(names)} there ({what}).",
            "nothing can be built without it.",
            f"name it: -o {option}=FILE.",
        )
    return found


def require_one_file(value: Any, what: str) -> str:
    """Return the name of a row's one file: a text, or a list of one text.

    Raises:
        BadSampleError: it lists several files.
        ValueError: it is neither, or empty.
    """
    if isinstance(value, list):
        if len(value) > 1:
            raise BadSampleError(
                f"several media: {what} lists {len(value)} files; a sample has one of a kind"
            )
        value = value[0] if value else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {value!r}, not a text")
    return value.strip()


def get_extension(modality: str, name: str) -> str | None:
    """Get the part extension of a file of a modality; None if the modality does not read it."""
    suffix = PurePosixPath(name).suffix.lower().lstrip(".")
    accepted = next(iter(get_modality(modality).required_parts.values()))
    return suffix if suffix in accepted else None


def get_picture_extension(name: str) -> str | None:
    """Get `jpg` from `a/b.JPG`; None if the file is not a picture."""
    return get_extension("image", name)


def list_picture_names(name: str) -> tuple[str, ...]:
    """List the names that a fetched picture may have: the given one, then other extensions'."""
    stem = str(PurePosixPath(name).with_suffix(""))
    accepted = next(iter(get_modality("image").required_parts.values()))
    return tuple(dict.fromkeys((name, *(f"{stem}.{extension}" for extension in accepted))))


def find_first_file(folders: Iterable[Path], names: Iterable[str]) -> Path | None:
    """Find the first of these names that is a file in one of these folders.

    Names in the other Unicode form, or with a backslash between folders, are found too.
    """
    tried, searched = list(names), list(folders)
    paths = (folder / name for folder in searched for name in tried)
    exact = next((path for path in paths if is_file(path)), None)
    if exact is not None:
        return exact
    unusual = (n for n in tried if "\\" in n or not n.isascii())
    return next((f for n in unusual if (f := find_named_file(searched, n)) is not None), None)


def get_write_stamp(path: Path) -> int:
    """Get a number that changes when a local file or folder is written; 0 for a remote one.

    Caches of a file's content are keyed by it.
    """
    return path.stat().st_mtime_ns if isinstance(path, Path) else 0
