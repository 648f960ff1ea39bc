"""Python's garbage collector, where it would do work for nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def leave_imports_uncollected() -> Iterator[None]:
    """Collect no garbage while modules are imported, nor ever walk through them later.

    Each full collection walks through all objects: a seventh of the time in which torch and
    transformers are imported, and a pause in the middle of a step. For processes that end with
    their work: what is garbage by then stays.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
