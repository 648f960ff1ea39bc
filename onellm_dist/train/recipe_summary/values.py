"""Every key of a resolved recipe with its value, and where that comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onellm_dist.common.secrets import mask_value
from onellm_dist.common.text_table import format_table
from onellm_dist.config.keys import BASE_KEY, describe_keys
from onellm_dist.config.load import LoadedRecipe
from onellm_dist.config.yaml_text import dump_inline

DEFAULT = "default"


def format_values(loaded: LoadedRecipe) -> list[str]:
    """Format one line for each key: the key, its value, and what set it.

    That is `default`, `FILE:LINE` or `command line`. Each dataset of the mixture has a line of its
    own. Secrets are masked.

    Args:
        loaded: the recipe.
    """
    return format_table(list(_list_rows(loaded)))


def _list_rows(loaded: LoadedRecipe) -> Iterator[tuple[str, str, str]]:
    values = mask_value(loaded.config.model_dump(mode="json", by_alias=True))
    for name in (key.name for key in describe_keys() if key.name != BASE_KEY.name):
        try:
            value = _find_value(values, name)
        except KeyError:  # below a section that is not there, or in a list
            continue
        if isinstance(value, dict) and name in _SECTIONS:
            continue
        origin = loaded.layers.describe_origin(name) or DEFAULT
        if isinstance(value, list) and f"{name}[]" in _SECTIONS:
            for number, item in enumerate(value):
                yield f"{name}[{number}]", dump_inline(item), origin
        else:
            yield name, dump_inline(value), origin


def _find_value(values: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(values, dict):
            raise KeyError(name)
        values = values[part]
    return values


_SECTIONS = {key.name.rpartition(".")[0] for key in describe_keys()}
"""Keys that have keys below them; with `[]`: lists of sections."""
