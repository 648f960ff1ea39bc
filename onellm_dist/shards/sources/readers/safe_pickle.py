"""Reading pickles of plain values (lists, dicts, texts, numbers) without running code of theirs.

RefCOCO's annotations exist as pickles alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onellm_dist.common.bounded_pickle import LARGEST_PICKLE, BoundedUnpickler
from onellm_dist.common.errors import UsageError


class _PlainUnpickler(BoundedUnpickler):
    most_operations = 8_000_000
    """RefCOCO's largest table has 4 million; each makes an object of at most 100 bytes."""


def load_plain(path: Path) -> Any:
    """Load a pickle of any protocol, also of Python 2 (its texts are read as UTF-8).

    Raises:
        UsageError: the file is not a pickle, is cut short, is too large, or holds more than plain
            values.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_PICKLE + 1)
        return _PlainUnpickler(content, errors="surrogateescape").load()
    except Exception as error:  # broken pickles raise nearly anything; none of their code is run
        raise UsageError(
            f"{path} is not a pickle of plain values: {error or type(error).__name__}",
            "a pickle can contain code, which is never run here.",
            "download the file from its authors again.",
        ) from error
