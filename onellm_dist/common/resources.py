"""Where the files that users read and edit lie: the checkout's top-level folders, or their copies in the wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _folder(name: str) -> Path:
    installed = _PACKAGE / "_shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def recipes_dir() -> Path:
    """`launch/recipes/`: a run each."""
    return _folder("launch") / "recipes"


def ds_configs_dir() -> Path:
    """`ds_configs/`: the DeepSpeed JSON files."""
    return _folder("ds_configs")


def shard_recipes_dir() -> Path:
    """`shards/`: one dataset recipe a dataset."""
    return _folder("shards")


def user_cache() -> Path:
    """What may be made again: `$ONELLM_CACHE`, or `$XDG_CACHE_HOME/onellm_dist`, or `~/.cache/onellm_dist`."""
    own = os.environ.get("ONELLM_CACHE")
    return (
        Path(own)
        if own
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onellm_dist"
    )
