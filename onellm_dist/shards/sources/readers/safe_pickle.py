"""Reading pickles of plain values (lists, dicts, texts, numbers) without ever running what they say."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError


class _PlainOnly(pickle.Unpickler):
    """Refuses every name: plain values need none, and code cannot be reached without one."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to use {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of it")


def load_plain(path: Path) -> Any:
    """The value of a pickle of any protocol, Python 2's too (its texts are read as UTF-8).

    Raises:
        UsageError: it is no pickle, is cut short, or holds more than plain values.
    """
    try:
        return _PlainOnly(
            io.BytesIO(path.read_bytes()), encoding="utf-8", errors="surrogateescape"
        ).load()
    except Exception as error:  # broken pickles raise nearly anything; nothing of them has been run
        raise UsageError(
            f"{path} is no pickle of plain values: {error or type(error).__name__}",
            "a pickle can hold code, which is never run here.",
            "fetch the file from its authors again.",
        ) from error
