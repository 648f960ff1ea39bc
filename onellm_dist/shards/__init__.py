"""Tar shards: their format, their builder, and the tools that check, repair and show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onellm_dist.shards.build.build_dataset import build_dataset
    from onellm_dist.shards.format.dataset import open_dataset
    from onellm_dist.shards.tools.webdataset_pipeline import as_webdataset

__all__ = ["as_webdataset", "build_dataset", "open_dataset"]

_HOMES = {
    "as_webdataset": "onellm_dist.shards.tools.webdataset_pipeline",
    "build_dataset": "onellm_dist.shards.build.build_dataset",
    "open_dataset": "onellm_dist.shards.format.dataset",
}
"""Public name to the module that defines it, imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
