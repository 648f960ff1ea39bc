"""The contract of a source: one module (or package) of this folder is one source, found by its `SOURCE`.

    SOURCE = Source(name="folder", summary="a folder of media and captions", options={...}, build=build)

`build(inputs, out, *, workers, seed, **options)` writes one dataset into `out`, or several in subfolders of it, and returns
a BuildReport. `out` is a new, empty staging folder: `build_dataset` renames it when the function returns, and removes it
when it raises, so a source never cares for half-written output. Its `options` arrive complete (defaults filled in) and of
the right type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onellm_dist.errors import UsageError


@dataclass(frozen=True)
class Option:
    """One option of a source, as the command line and dataset recipes give it."""

    default: Any
    help: str
    kind: type = str
    """str, int, float, bool, or Path. A text (from a command line) is converted to it."""

    def convert(self, name: str, value: Any) -> Any:
        """`value` as this option's type; None stays None where that is the default.

        Raises:
            UsageError: it cannot be converted.
        """
        if value is None and self.default is None:
            return None
        try:
            if self.kind is bool and not isinstance(value, bool):
                return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]
            if self.kind is int and isinstance(value, float) and not value.is_integer():
                raise ValueError
            return self.kind(value)
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"option {name}={value!r} is not of type {self.kind.__name__}.", self.help, f"the default is {self.default!r}."
            ) from None


@dataclass(frozen=True)
class Quarantined:
    """One sample that was left out, with the reason."""

    key: str
    file: str
    reason: str


@dataclass(frozen=True)
class BuildReport:
    """What a source built."""

    samples: int
    quarantined: tuple[Quarantined, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines for the user, such as files that were ignored."""


@dataclass(frozen=True)
class Source:
    """A kind of input that shards are built from."""

    name: str
    summary: str
    build: Callable[..., BuildReport | None]
    """(inputs: Path | None, out: Path, *, workers: int, seed: int, **options); None: nothing to report."""
    options: Mapping[str, Option] = field(default_factory=dict)
    needs_input: bool = True
    """False: `inputs` is None (generated data)."""
