"""Folders whose files name code of their own (`auto_map`): it is never run, and never asked about.

All calls of transformers' Auto classes say `trust_remote_code=False`. Left out, transformers would
ask on a terminal whether to run the code, and one keystroke of a rank would answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onellm_dist.common.errors import UsageError

_SIGNS = ("trust_remote_code", "custom code")
"""Words of the errors that transformers raises where a folder cannot be read without its code."""

REASON = "code from a model's folder could do anything on this machine, so it is never run here."
REMEDY = (
    "use a model whose class transformers has itself (often a newer release of the same one), or "
    "save it as such a class where you trust the code."
)


def make_remote_code_error(path: Path, error: BaseException) -> UsageError | None:
    """What to tell the user where a folder needs its own code; None if that is not what is wrong.

    Args:
        path: the folder.
        error: what transformers raised.
    """
    if not isinstance(error, ValueError) or not any(sign in str(error) for sign in _SIGNS):
        return None
    return UsageError(
        f"{path}: its files name Python code of their own (auto_map) that would have to be run to "
        "read them",
        REASON,
        REMEDY,
    )


@contextmanager
def refuse_remote_code(path: Path) -> Iterator[None]:
    """Say it in words where transformers refuses a folder for its code.

    Args:
        path: the folder that the block reads with `trust_remote_code=False`.

    Raises:
        UsageError: the folder needs its own code.
    """
    try:
        yield
    except ValueError as error:
        refusal = make_remote_code_error(path, error)
        if refusal is None:
            raise
        raise refusal from None
