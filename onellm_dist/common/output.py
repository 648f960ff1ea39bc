"""What a command says on its own account: its result, and why it failed.

Everything else that a process has to say goes to `logging`, which names the rank. ruff (T20) holds
the package to it.
"""

from __future__ import annotations

import sys


def write_output(*lines: str, flush: bool = False) -> None:
    """Write lines of a command's result to stdout.

    Args:
        lines: the lines; none: an empty one.
        flush: whether they must be seen at once, by a process that waits for them.
    """
    print("\n".join(lines), flush=flush)


def write_error(text: str, *, end: str = "\n") -> None:
    """Write to stderr, at once, for the person or the script that started the process."""
    print(text, end=end, file=sys.stderr, flush=True)
