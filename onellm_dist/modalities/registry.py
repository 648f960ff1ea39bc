"""Which modalities there are: the files of this folder and the entry points of other packages.

A package adds a modality without changing this one. Its metadata names a module that has a
`MODALITY`, or a `Modality` object:

    [project.entry-points."onellm_dist.modalities"]
    thermal = "my_package.thermal"

Once the package is installed, every command and every training rank knows the modality.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache

from onellm_dist.common.errors import UsageError
from onellm_dist.common.plugins import MODALITIES, load_plugins
from onellm_dist.modalities.base import Modality


@cache
def all_modalities() -> dict[str, Modality]:
    """Find all modalities, once per process.

    Returns:
        Name to modality, in the order of their spans in the LLM sequence.

    Raises:
        UsageError: an entry point cannot be loaded or is not a modality, or two modalities share
            a name or an order.
    """
    return sort_modalities([*_find_in_package(), *_find_in_entry_points()])


def get_modality(name: str) -> Modality:
    """Return the modality called `name`.

    Raises:
        UsageError: there is no such modality.
    """
    try:
        return all_modalities()[name]
    except KeyError:
        raise UsageError(
            f"unknown modality {name!r}",
            f"neither a file in onellm_dist/modalities/ nor an entry point of the group "
            f"{MODALITIES} in an installed package defines it.",
            f"use one of: {', '.join(all_modalities())}; or install the package that adds it.",
        ) from None


def sort_modalities(found: Iterable[tuple[str, Modality]]) -> dict[str, Modality]:
    """Check that names and orders are unique, and sort by order.

    Args:
        found: pairs of the place that defines a modality (for messages) and the modality.

    Raises:
        UsageError: two modalities share a name or an order; the message names both places.
    """
    taken: dict[tuple[str, str | int], str] = {}
    modalities: list[Modality] = []
    for place, modality in found:
        for key in (("name", modality.name), ("order", modality.order)):
            if key in taken:
                field, value = key
                raise UsageError(
                    f"two modalities have the {field} {value!r}: {taken[key]} and {place}",
                    "names select a modality; orders say where its span stands in a sequence.",
                    f"give one of them another {field}, or uninstall the package that adds it.",
                )
            taken[key] = place
        modalities.append(modality)
    return {m.name: m for m in sorted(modalities, key=lambda m: m.order)}


def _find_in_package() -> Iterator[tuple[str, Modality]]:
    """Yield place and modality for every module of this folder that has a `MODALITY`."""
    for info in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        module = importlib.import_module(f"{__package__}.{info.name}")
        if hasattr(module, "MODALITY"):
            yield module.__name__, module.MODALITY


def _find_in_entry_points() -> Iterator[tuple[str, Modality]]:
    """Yield place and modality for every entry point of the group.

    The code in a model's folder has all that the model reads, and knows no other packages.
    """
    if __package__ != MODALITIES:
        return
    for name, loaded in load_plugins(MODALITIES).items():
        place = f"entry point {name} of group {MODALITIES}"
        modality = getattr(loaded, "MODALITY", loaded)
        if not isinstance(modality, Modality):
            raise UsageError(
                f"{place} is a {type(loaded).__name__}, not a modality",
                "it must be a module with a MODALITY, or an instance of a subclass of Modality.",
                "correct the entry point, or uninstall its package.",
            )
        yield place, modality
