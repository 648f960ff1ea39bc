"""Which sources there are, and their options made complete."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import sources as sources_folder
from onellm_dist.shards.build.settings import OPTIONS, BuildSettings
from onellm_dist.shards.sources.base import Option, Source


@cache
def all_sources() -> dict[str, Source]:
    """Name to source: every module in shards/sources/ that has a `SOURCE`, or `SOURCES` of one family."""
    found = list[Source]()
    for info in pkgutil.iter_modules(sources_folder.__path__):
        module = importlib.import_module(f"{sources_folder.__name__}.{info.name}")
        if isinstance(getattr(module, "SOURCE", None), Source):
            found.append(module.SOURCE)
        found += [s for s in getattr(module, "SOURCES", ()) if isinstance(s, Source)]
    return {s.name: s for s in sorted(found, key=lambda s: s.name)}


def get_source(name: str) -> Source:
    """The source of this name.

    Raises:
        UsageError: there is none.
    """
    known = all_sources()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"unknown source {name!r}{f'; did you mean {close[0]!r}?' if close else ''}",
            "no module in onellm_dist/shards/sources/ builds it.",
            f"use one of: {', '.join(known)} (`onellm shards build NAME x -o help` describes one).",
        )
    return known[name]


def get_options(source: Source) -> dict[str, Option]:
    """A source's own options and, where the builder does the work, the builder's."""
    return {**source.options, **(OPTIONS if source.plan is not None else {})}


def complete_options(
    source: Source, given: Mapping[str, Any], *, name: str
) -> tuple[dict[str, Any], BuildSettings | None]:
    """The source's own options, complete and converted, and the builder's settings (None: the source builds by itself).

    Args:
        given: what the user says.
        name: the dataset's name where none is given.

    Raises:
        UsageError: an option that there is not, or of another type.
    """
    known = get_options(source)
    for option in given:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            raise UsageError(
                f"source {source.name!r} has no option {option!r}{f'; did you mean {close[0]!r}?' if close else ''}",
                "an option that is not understood would be ignored.",
                f"it has: {', '.join(known) or 'none'}.",
            )
    values = {n: option.convert(n, given.get(n, option.default)) for n, option in known.items()}
    if "name" in values:
        values["name"] = values["name"] or name
    if source.plan is None:
        return values, None
    values["licence"] = values["licence"] or source.licence
    settings = BuildSettings(**{n: values[n] for n in OPTIONS})
    return {n: values[n] for n in source.options}, settings
