"""What was wrong with a file that could be read all the same.

A damaged place costs what it damages: a packet of sound, a point without a position. The decoder
notes what is missing and continues. Whoever opens the file decides what to do with the notes: the
builder stores them beside the dataset, `onellm generate` shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from onellm_dist.common.errors import SampleError

DAMAGED_SHARE = 0.25
"""Share of what the model reads of a file that may be missing; with more, the file is refused."""

ASSUMED = "assumed: "
"""How a note begins that is about no damage."""

_notes: ContextVar[list[str] | None] = ContextVar("damage", default=None)


@contextmanager
def collect_damage() -> Iterator[list[str]]:
    """Collect what decoders note inside the `with` block, in the order in which they note it."""
    found: list[str] = []
    token = _notes.set(found)
    try:
        yield found
    finally:
        _notes.reset(token)


def note_assumption(what: str) -> None:
    """Note what a decoder took for granted because the file does not say it.

    Args:
        what: what was assumed, as in "16-bit values of at most 4,000 are taken as 12 bits".
    """
    notes = _notes.get()
    if notes is not None:
        notes.append(f"{ASSUMED}{what}")


def note_damage(what: str, share: float) -> None:
    """Note that a part of a file is missing or unreadable, and that the rest is used.

    Args:
        what: what is missing and of which file, as in ".mp3: 0.03 s of 3.00 s are unreadable".
        share: how much of what the model reads of the file is missing, 0 to 1.

    Raises:
        SampleError: the share is more than `DAMAGED_SHARE`.
    """
    if share > DAMAGED_SHARE:
        raise SampleError(
            what,
            f"up to {DAMAGED_SHARE:.0%} of what the model reads may be missing; this is "
            f"{share:.0%}.",
            "download or encode the file again, or drop the sample.",
        )
    notes = _notes.get()
    if notes is not None:
        notes.append(what)
