"""Folders that users read and edit, and the user's cache.

The folders are those at the top of the checkout, or their copies in the wheel.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _find_folder(name: str) -> Path:
    installed = _PACKAGE / "_shipped" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def recipes_dir() -> Path:
    """Return `launch/recipes/`, with one file per run."""
    return _find_folder("launch") / "recipes"


def ds_configs_dir() -> Path:
    """Return `ds_configs/`, with the DeepSpeed JSON files."""
    return _find_folder("ds_configs")


def shard_recipes_dir() -> Path:
    """Return `shards/`, with one recipe per dataset."""
    return _find_folder("shards")


def count_cpus() -> int:
    """Return how many CPUs this process may use: those of its job, not those of the machine."""
    allowed = len(os.sched_getaffinity(0))
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(allowed, int(given)) if given.isdecimal() and int(given) else allowed


def name_processors() -> str:
    """Return the model of this machine's processors and how many this process may use."""
    model = platform.machine() or "processors"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            model = " ".join(value.split())
            break
    return f"{model} x {len(os.sched_getaffinity(0))}"


def user_cache() -> Path:
    """Return the folder for what can be recomputed.

    It is `$ONELLM_CACHE`, `$XDG_CACHE_HOME/onellm_dist` or `~/.cache/onellm_dist`.
    """
    own = os.environ.get("ONELLM_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onellm_dist"
