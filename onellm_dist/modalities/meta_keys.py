"""Keys of a sample's `.json` that say how its media are to be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MetaKey:
    """One key; a modality lists its keys in `meta_keys`.

    `onellm shards build -o describe=KEY=VALUE` writes it into every sample of a dataset.
    """

    help: str
    """What the key says of the media."""
    parse: Callable[[str], Any]
    """From the text of a command line to the value in the `.json`; ValueError if it is none."""


def parse_flag(text: str) -> bool:
    """Parse true or false."""
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse_factor(text: str) -> float:
    """Parse a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is not a number above 0")
    return value


def make_choice_parser(*choices: str) -> Callable[[str], str]:
    """Make a parser of one of several words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse
