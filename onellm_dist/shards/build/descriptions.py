"""What all media of a dataset have in common and no file says: the option `describe`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import get_modality
from onellm_dist.modalities.meta_keys import MetaKey
from onellm_dist.shards.sources.base import Source


def list_keys(modalities: Sequence[str]) -> dict[str, MetaKey]:
    """The keys by which these modalities read their media."""
    return {k: v for name in modalities for k, v in get_modality(name).meta_keys.items()}


@lru_cache(maxsize=8)
def parse_description(text: str | None, modalities: tuple[str, ...]) -> Mapping[str, Any]:
    """Parse the option `describe`: `key=value` pairs, separated by commas.

    Args:
        text: the option's value; None: nothing is said.
        modalities: those of the dataset.

    Returns:
        Values for each sample's `.json`.

    Raises:
        UsageError: a pair is none, a key is not one of the modalities', or a value is impossible.
    """
    found: dict[str, Any] = {}
    known = list_keys(modalities)
    listed = "; ".join(f"{k}: {v.help}" for k, v in known.items()) or "there are no such keys"
    for pair in text.split(",") if text is not None else ():
        key, mark, value = (piece.strip() for piece in pair.partition("="))
        if not mark or key not in known or key in found:
            what = (
                "is given twice" if key in found else "is none of its keys" if mark else "has no ="
            )
            raise UsageError(
                f"describe={text}: {key or pair!r} {what}.",
                f"it says how media of {' and '.join(modalities) or 'text'} are read ({listed}).",
                "write -o describe=KEY=VALUE; several are separated by commas.",
            )
        try:
            found[key] = known[key].parse(value)
        except ValueError as error:
            raise UsageError(
                f"describe={text}: {key}: {error}.",
                f"it is {known[key].help}.",
                "correct the value.",
            ) from None
    return found


def check_description(text: str | None, modalities: tuple[str, ...], source: Source) -> None:
    """Check the option `describe` before a build begins.

    Args:
        text: the option's value.
        modalities: those of the dataset.
        source: where its media come from.

    Raises:
        UsageError: it cannot be used, or the source itself decides what it says.
    """
    for key in parse_description(text, modalities):
        if key in source.own_keys:
            raise UsageError(
                f"describe={text}: source {source.name!r} decides on {key} itself.",
                f"its own option says how its input is read: {source.own_keys[key]}.",
                f"use -o {source.own_keys[key]}.",
            )


def add_description(
    parts: dict[str, bytes], meta: dict[str, Any], described: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what is said of all samples into one; what the sample itself says stays.

    Args:
        parts: its texts; `.json` is replaced.
        meta: its `.json` as a value.
        described: from `parse_description`.

    Returns:
        The new `.json` as a value.
    """
    if not described:
        return meta
    meta = {**described, **meta}
    parts["json"] = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
    return meta
