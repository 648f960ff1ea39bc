"""Which sources exist, and their options with all defaults filled in.

A source is a module of `onellm_dist/shards/sources/` with a `SOURCE` (or `SOURCES`, a family), or
an entry point of the group `onellm_dist.sources` of any installed package, which loads such a
module or a `Source`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.plugins import SOURCES, load_plugins
from onellm_dist.shards import sources as sources_folder
from onellm_dist.shards.build.settings import OPTIONS, BuildSettings
from onellm_dist.shards.sources.base import Option, Source


@cache
def all_sources() -> dict[str, Source]:
    """Return name to source, in order of name.

    Raises:
        UsageError: two sources share a name (the message names both places), or an entry point
            loads something else.
    """
    places: dict[str, str] = {}
    sources: list[Source] = []
    for place, source in (*_find_in_package(), *_find_in_entry_points()):
        if source.name in places:
            raise UsageError(
                f"two sources have the name {source.name!r}: {places[source.name]} and {place}",
                "the name selects a source.",
                "give one of them another name, or uninstall the package that adds it.",
            )
        places[source.name] = place
        sources.append(source)
    return {s.name: s for s in sorted(sources, key=lambda s: s.name)}


def _find_in_package() -> Iterator[tuple[str, Source]]:
    """Yield place and source for every source of this package."""
    for info in pkgutil.iter_modules(sources_folder.__path__):
        module = importlib.import_module(f"{sources_folder.__name__}.{info.name}")
        for source in _get_sources(module):
            yield module.__name__, source


def _find_in_entry_points() -> Iterator[tuple[str, Source]]:
    """Yield place and source for every entry point of the group."""
    for name, loaded in load_plugins(SOURCES).items():
        place = f"entry point {name} of group {SOURCES}"
        found = _get_sources(loaded) if isinstance(loaded, ModuleType) else [loaded]
        if not found or not all(isinstance(source, Source) for source in found):
            raise UsageError(
                f"{place} loads {loaded!r}, which is not a source",
                "it must be a Source, or a module with a SOURCE or SOURCES.",
                "correct the entry point, or uninstall its package.",
            )
        yield from ((place, source) for source in found)


def _get_sources(module: ModuleType) -> list[Source]:
    found = [getattr(module, "SOURCE", None), *getattr(module, "SOURCES", ())]
    return [source for source in found if isinstance(source, Source)]


def get_source(name: str) -> Source:
    """Return the source of this name.

    Raises:
        UsageError: there is none.
    """
    known = all_sources()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"unknown source {name!r}{f'; did you mean {close[0]!r}?' if close else ''}",
            f"neither this package nor an entry point of the group {SOURCES} defines it.",
            f"use one of: {', '.join(known)} (`onellm shards build NAME --help` describes one).",
        )
    return known[name]


def get_options(source: Source) -> dict[str, Option]:
    """Return the source's own options and, if it is planned, the builder's."""
    return {**source.options, **(OPTIONS if source.plan is not None else {})}


def complete_options(
    source: Source, given: Mapping[str, Any], *, name: str
) -> tuple[dict[str, Any], BuildSettings | None]:
    """Convert the given options, and fill in the defaults of all others.

    Args:
        source: whose options they are.
        given: what the user gives.
        name: the dataset's name if none is given.

    Returns:
        The source's own options, and the builder's settings (None: the source builds by itself).

    Raises:
        UsageError: an option is unknown, or of another type.
    """
    known = get_options(source)
    for option in given:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(
                f"source {source.name!r} has no option {option!r}{hint}",
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
