"""Arguments that pass through a second shell.

The deepspeed runner joins its arguments with spaces, and pdsh and ssh hand them to a shell on each
node. An argument with characters of the shell's own is written as `url:` and its percent-encoding,
which no shell changes. Nor does pdsh, which replaces %h, %n and %u: no percent-encoding has these.

    python -m onellm_dist.launch.arguments ARGUMENT...    prints each encoded, one a line
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from urllib.parse import quote, unquote

PREFIX = "url:"
_SAFE = re.compile(r"[A-Za-z0-9_./=:,+@-]+")


def encode_argument(argument: str) -> str:
    """An argument in a form that every shell passes on as it is."""
    if _SAFE.fullmatch(argument) and not argument.startswith(PREFIX):
        return argument
    encoded = quote(argument, safe="/=:,+@", errors="surrogateescape")
    return PREFIX + encoded.replace("~", "%7E")


def decode_argument(argument: str) -> str:
    """What `encode_argument` was given; any other argument stays as it is."""
    if not argument.startswith(PREFIX):
        return argument
    return unquote(argument.removeprefix(PREFIX), errors="surrogateescape")


def main(arguments: Sequence[str]) -> None:
    """Print arguments, encoded."""
    for argument in arguments:
        sys.stdout.write(encode_argument(argument) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
