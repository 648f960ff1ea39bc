"""The modalities of the package, found by looking: every module in this folder that has a `MODALITY`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities.base import QUERY_TOKENS, SPAN_TOKENS, Modality, Part

__all__ = ["QUERY_TOKENS", "SPAN_TOKENS", "Modality", "Part", "all_modalities", "get_modality"]


@cache
def all_modalities() -> dict[str, Modality]:
    """Name to modality, in the order of their runs in the LLM sequence."""
    found: list[Modality] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "MODALITY"):
            found.append(module.MODALITY)
    return {m.name: m for m in sorted(found, key=lambda m: m.order)}


def get_modality(name: str) -> Modality:
    """The modality of this name.

    Raises:
        UsageError: no such modality.
    """
    try:
        return all_modalities()[name]
    except KeyError:
        raise UsageError(
            f"unknown modality {name!r}",
            "no file in onellm_dist/modalities/ defines it.",
            f"use one of: {', '.join(all_modalities())}.",
        ) from None
