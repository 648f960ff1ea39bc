"""Reading pickles of plain values (lists, dicts, texts, numbers) without running code of theirs.

This is written by hand because pickle.load runs whatever a file names, and RefCOCO's annotations
exist as pickles alone.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError


class _PlainOnly(pickle.Unpickler):
    """Refuses every name: plain values need none, and code cannot be reached without names."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of it")


def load_plain(path: Path) -> Any:
    """Load a pickle of any protocol, also of Python 2 (its texts are read as UTF-8).

    Raises:
        UsageError: the file is not a pickle, is cut short, or holds more than plain values.
    """
    try:
        return _PlainOnly(
            io.BytesIO(path.read_bytes()), encoding="utf-8", errors="surrogateescape"
        ).load()
    except (
        Exception
    ) as error:  # broken pickles raise nearly anything; none of their code has been run
        raise UsageError(
            f"{path} is not a pickle of plain values: {error or type(error).__name__}",
            "a pickle can contain code, which is never run here.",
            "download the file from its authors again.",
        ) from error
