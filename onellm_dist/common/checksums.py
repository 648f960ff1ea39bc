"""SHA-256 of the files of a model folder: written beside them, read by whoever uses them.

`SHA256SUMS` is what `sha256sum` writes and `sha256sum --check` reads. Folders of `onellm convert`
have the same in `conversion.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import sha256_file

SUMS = "SHA256SUMS"
RECORD = "conversion.json"
"""What a conversion writes about itself."""
COVERED = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.pth")
"""Files that a model's numbers depend on; cards and tokenizers may be edited by hand."""

SEAL = "content_sha256"
"""Key of a JSON file's checksum of its other keys."""

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS for the files of a folder that a model's numbers depend on.

    Args:
        folder: the folder; its files are complete.
        known: name -> SHA-256 of files that need not be read again.

    Raises:
        OSError: a file cannot be read, or the disk is full.
    """
    known = known or {}
    names = sorted({path.name for pattern in COVERED for path in folder.glob(pattern)})
    lines = [f"{known.get(name) or sha256_file(folder / name)}  {name}\n" for name in names]
    if lines:
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 that a folder records of its files; empty if it records none.

    Raises:
        UsageError: the record is damaged.
    """
    sums: dict[str, str] = {}
    path = folder / RECORD
    try:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            sums |= {str(entry["file"]): str(entry["sha256"]) for entry in content["result"]}
        path = folder / SUMS
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                match = _LINE.fullmatch(line)
                if match is None:
                    raise ValueError(f"a line is {line[:80]!r}")
                sums[match[2]] = match[1]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}",
            "it has the checksums of the files beside it.",
            "copy it again; or remove it, if you trust these files without.",
        ) from None
    return sums


def check_small_files(folder: Path) -> None:
    """Check config and index of a folder against the checksums that it records.

    Raises:
        UsageError: one of them was changed or damaged.
    """
    for name, digest in read_sums(folder).items():
        path = folder / name
        if name.endswith(".json") and path.is_file() and sha256_file(path) != digest:
            raise make_checksum_error(path)


def make_checksum_error(path: Path) -> UsageError:
    """The error for a file whose SHA-256 is not the recorded one.

    Args:
        path: the file.
    """
    return UsageError(
        f"{path} is damaged or was changed: its SHA-256 is not the one that was recorded when it "
        "was written",
        "a single changed bit would become another model.",
        f"copy it again; or, if you changed it on purpose, remove its line from {SUMS} (or "
        f"{RECORD}) beside it.",
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
