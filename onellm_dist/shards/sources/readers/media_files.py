"""Finding the files that annotation lists name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import get_modality


def resolve_below(inputs: Path, path: Path | str) -> Path:
    """An option's path: relative to the input folder, unless it is absolute."""
    return Path(path) if Path(path).is_absolute() else inputs / str(path)


def require_file(
    inputs: Path, path: Path | str | None, usual: Iterable[str], what: str, option: str
) -> str:
    """The name, relative to `inputs` (or absolute), of a file that a source cannot do without.

    Args:
        path: the user's choice.
        usual: where it lies else; the first that is there.
        what: what it is, for the error.
        option: which option names it.

    Raises:
        UsageError: it is not there.
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


def require_folder(
    inputs: Path, path: Path | str | None, usual: Iterable[str], what: str, option: str
) -> Path:
    """As `require_file`, for a folder; `"."` is the input folder itself.

    Raises:
        UsageError: it is not there.
    """
    names = [str(path)] if path is not None else list(usual)
    found = next(
        (f for n in names if (f := inputs if n == "." else resolve_below(inputs, n)).is_dir()), None
    )
    if found is None:
        raise UsageError(
            f"{inputs}: no folder {' or '.join(names)} there ({what}).",
            "media are looked for there.",
            f"name it: -o {option}=FOLDER.",
        )
    return found


def get_extension(modality: str, name: str) -> str | None:
    """The part extension of a file of a modality's first slot; None: not one that the modality reads."""
    suffix = PurePosixPath(name).suffix.lower().lstrip(".")
    accepted = next(iter(get_modality(modality).required_parts.values()))
    return suffix if suffix in accepted else None


def get_picture_extension(name: str) -> str | None:
    """`jpg` of `a/b.JPG`; None where it is no picture."""
    return get_extension("image", name)


def find_first_file(folders: Iterable[Path], names: Iterable[str]) -> Path | None:
    """The first of these names that is a file in one of these folders."""
    tried = list(names)
    return next((f for folder in folders for n in tried if (f := folder / n).is_file()), None)


def get_write_stamp(path: Path) -> int:
    """Changes when a local file or folder is written: what a cache of its content is keyed by. 0 for remote ones."""
    return path.stat().st_mtime_ns if isinstance(path, Path) else 0
