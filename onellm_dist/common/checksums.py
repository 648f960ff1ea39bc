"""SHA-256 of the files of a model folder: written beside them, compared where they are used.

`SHA256SUMS` is what `sha256sum` writes and `sha256sum --check` reads (`sums_file.py`). Folders of
`onellm convert` have the same in `conversion.json`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import sha256_file, write_atomic
from onellm_dist.common.sums_file import format_line, normalise_name, parse_sums

SUMS = "SHA256SUMS"
RECORD = "conversion.json"
"""What a conversion writes about itself."""
COVERED = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.pth")
"""Files that a model's numbers depend on; cards and tokenizers may be edited by hand."""
USED = (".json", ".safetensors", ".bin", ".pth", ".pt")
"""Suffixes of files that are compared, where a folder records them, before a model is loaded."""
MOST_BYTES = 64 << 20
"""Bytes of a larger record, which is none."""

STABLE_AGE_NS = 2_000_000_000
"""Age of a file whose times tell whether it was written again."""

SEAL = "content_sha256"
"""Key of a JSON file's checksum of its other keys."""


def write_sums(
    folder: Path, known: Mapping[str, str] | None = None, *, names: Iterable[str] = ()
) -> None:
    """Write SHA256SUMS for the files of a folder that a model's numbers depend on.

    Args:
        folder: the folder; its files are complete.
        known: name -> SHA-256 of files that need not be read again.
        names: further files that are listed.

    Raises:
        OSError: a file cannot be read, or the disk is full.
    """
    known = known or {}
    covered = {path.name for pattern in COVERED for path in folder.glob(pattern)}
    lines = [
        format_line(known.get(name) or sha256_file(folder / name), name)
        for name in sorted(covered | set(names))
    ]
    if lines:
        write_atomic(folder / SUMS, "".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 that a folder records of its files; empty if it records none.

    Names are relative to the folder, with `/`; entries of files outside it are left out. Where both
    records have a file, SHA256SUMS counts.

    Raises:
        UsageError: the record is damaged.
    """
    sums: dict[str, str] = {}
    path = folder / RECORD
    try:
        if path.is_file():
            content = json.loads(_read_text(path))
            for entry in content["result"]:
                if (name := normalise_name(str(entry["file"]))) is not None:
                    sums[name] = str(entry["sha256"])
        path = folder / SUMS
        if path.is_file():
            sums |= parse_sums(_read_text(path))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}",
            "it has the checksums of the files beside it.",
            "copy it again; or remove it, if you trust these files without.",
        ) from None
    return sums


def _read_text(path: Path) -> str:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    return path.read_text(encoding="utf-8-sig")


def check_small_files(folder: Path) -> None:
    """Check config and index of a folder against the checksums that it records.

    Raises:
        UsageError: one of them was changed or damaged.
    """
    for name, digest in read_sums(folder).items():
        path = folder / name
        if name.endswith(".json") and path.is_file() and hash_once(path) != digest:
            raise make_checksum_error(path)


def check_folder(folder: Path) -> None:
    """Check all files that a model is loaded from, as far as their folder records checksums.

    A file is read once per process.

    Raises:
        UsageError: a file was changed or damaged.
        OSError: a file cannot be read.
    """
    for path, digest in list_recorded_files(folder).items():
        if hash_once(path) != digest:
            raise make_checksum_error(path)


def list_recorded_files(folder: Path) -> dict[Path, str]:
    """File -> recorded SHA-256 of all files that a model is loaded from.

    Args:
        folder: the model's folder.

    Raises:
        UsageError: the record is damaged.
    """
    found = {folder / name: digest for name, digest in sorted(read_sums(folder).items())}
    return {
        path: digest
        for path, digest in found.items()
        if path.suffix in USED and path.parent == folder and path.is_file()
    }


_HASHED: dict[Path, tuple[tuple[int, ...], str]] = {}
"""File -> what distinguishes it from a changed one, and its SHA-256."""


def hash_once(path: Path) -> str:
    """SHA-256 of a file, read once per process as long as nobody writes it.

    Raises:
        OSError: the file cannot be read.
    """
    known = get_hash(path)
    if known is None:
        stamp, known = _stamp(path), sha256_file(path)
        _keep_hash(path, stamp, known)
    return known


def get_hash(path: Path) -> str | None:
    """SHA-256 of a file that this process has read already; None: it has not.

    Raises:
        OSError: there is no such file.
    """
    known = _HASHED.get(path.absolute())
    return known[1] if known is not None and known[0] == _stamp(path) else None


def remember_hash(path: Path, digest: str) -> None:
    """Keep the SHA-256 that another process of this machine has computed.

    Args:
        path: the file.
        digest: its SHA-256.
    """
    _keep_hash(path, _stamp(path), digest)


def _keep_hash(path: Path, stamp: tuple[int, ...], digest: str) -> None:
    """Keep a checksum, unless a write right after it could leave the same times (ticks of 4 ms)."""
    if time.time_ns() - max(stamp[-2:]) > STABLE_AGE_NS:
        _HASHED[path.absolute()] = stamp, digest


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return (
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


@contextmanager
def renew_sums(folder: Path) -> Iterator[None]:
    """Keep what a folder records about its files true while some of them are written anew.

    Files that were not written keep their checksums. `conversion.json` is removed where it
    describes others. Until the block ends, and after an error, the old records stay: a folder that
    was written in part is then refused.

    Args:
        folder: the folder, which need not exist.

    Raises:
        OSError: a record cannot be removed or written.
    """
    before = _read_stamps(folder)
    yield
    if not before:
        return
    after = {name: _stamp_or_none(folder / name) for name in before}
    changed = [name for name, (_, stamp) in before.items() if after[name] != stamp]
    if not changed:
        return
    kept = {name: digest for name, (digest, _) in before.items() if name not in changed}
    present = [name for name in before if after[name] is not None]
    write_sums(folder, kept, names=present)
    (folder / RECORD).unlink(missing_ok=True)


def _read_stamps(folder: Path) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Name -> (recorded SHA-256, stamp) of the files that a folder records."""
    try:
        sums = read_sums(folder)
    except UsageError:  # a damaged record: all is written anew
        return dict.fromkeys((p.name for p in folder.glob("*.safetensors")), ("", ()))
    return {name: (digest, _stamp_or_none(folder / name)) for name, digest in sums.items()}


def _stamp_or_none(path: Path) -> tuple[int, ...] | None:
    try:
        return _stamp(path)
    except OSError:
        return None


def make_checksum_error(path: Path) -> UsageError:
    """The error for a file whose SHA-256 is not the recorded one.

    Args:
        path: the file.
    """
    return UsageError(
        f"{path} is damaged or was changed: its SHA-256 is not the one that was recorded when it "
        "was written",
        "a single changed bit would become another model.",
        f"copy it again; or, if you or another program changed it on purpose, remove its line from "
        f"{SUMS} (or {RECORD}) beside it, or record the new files: cd "
        f"{shlex.quote(str(path.parent))} && sha256sum *.json *.safetensors > {SUMS}",
    )


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON content with a checksum of itself, which `is_intact` compares.

    Args:
        content: what `json.dumps` takes.
    """
    return {**content, SEAL: _hash_content(content)}


def is_intact(content: Mapping[str, Any]) -> bool:
    """Whether JSON content is what was sealed; content without a checksum counts as intact."""
    return SEAL not in content or content[SEAL] == _hash_content(content)


def _hash_content(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps({k: v for k, v in content.items() if k != SEAL}))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
