"""Which children of this process are workers."""

from __future__ import annotations

import contextlib

import psutil


def forked_children() -> list[psutil.Process]:
    """The living children that were forked: workers, not programs such as another test's zygote."""
    own = psutil.Process()
    forked = []
    for child in own.children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if child.cmdline() == own.cmdline():
                forked.append(child)
    return forked
