"""SUN RGB-D's folders: which belong to the test split, their class, picture and depth map."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import loadmat

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.shards.sources.base import BadSampleError, Media

_TOP = "SUNRGBD"


@dataclass(frozen=True)
class SunDepth:
    """A depth map of SUN RGB-D as a PNG of millimetres.

    Its 16-bit values are stored with their last 3 bits in front (the toolbox's read3dPoints.m).
    """

    stored: Media

    def read_bytes(self) -> bytes:
        """Turn the bits back.

        Raises:
            BadSampleError: it is not a 16-bit PNG.
        """
        data = self.stored.read_bytes()
        with decoding():
            try:
                picture = Image.open(io.BytesIO(data))
                values = np.asarray(picture)
            except (OSError, ValueError, SyntaxError) as error:
                raise BadSampleError(f"unreadable depth map: {error}") from error
            if values.ndim != 2 or values.dtype not in (np.uint16, np.int32):
                raise BadSampleError(f"unreadable depth map: {picture.mode}, not 16 bits")
            raw = values.astype(np.uint32)
            millimetres = ((raw >> 3) | (raw << 13)).astype(np.uint16)
            out = io.BytesIO()
            Image.fromarray(millimetres).save(out, "PNG")
            return out.getvalue()


def list_rooms(path: Path, key: str) -> Iterator[PurePosixPath]:
    """The folders of a split, relative to SUNRGBD/, as SUN RGB-D's allsplit.mat lists them.

    Args:
        path: allsplit.mat.
        key: `alltest` or `alltrain`.

    Raises:
        OneLLMError: it is another file.
    """
    try:
        content: dict[str, Any] = loadmat(io.BytesIO(path.read_bytes()))
        listed = [str(np.asarray(cell).item()) for cell in content[key].ravel()]
    except Exception as error:  # scipy raises nearly anything
        raise OneLLMError(
            f"{path}: {type(error).__name__}: {error}",
            "which rooms are tested stands in it.",
            "take traintestSUNRGBD/allsplit.mat of the SUN RGB-D toolbox.",
        ) from error
    for name in listed:
        parts = PurePosixPath(name).parts
        yield PurePosixPath(*parts[parts.index(_TOP) + 1 :])


def read_class(folder: Path) -> str:
    """The class of a room: its scene.txt, with spaces."""
    return (folder / "scene.txt").read_text("utf-8").strip().replace("_", " ")


def find_only_file(folder: Path, *names: str) -> Path | None:
    """The one file of the first of these subfolders that exists and has one."""
    for name in names:
        if (folder / name).is_dir():
            found = [p for p in sorted((folder / name).iterdir()) if not p.name.startswith(".")]
            if found:
                return found[0]
    return None
