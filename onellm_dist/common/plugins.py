"""What other packages add through entry points: modalities, sources, callbacks, benchmark tasks."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from onellm_dist.common.errors import UsageError

MODALITIES = "onellm_dist.modalities"
SOURCES = "onellm_dist.sources"
CALLBACKS = "onellm_dist.callbacks"
TASKS = "onellm_dist.tasks"


def load_plugins(group: str) -> dict[str, Any]:
    """Name to object of every entry point of `group`, in order of name.

    Raises:
        UsageError: an entry point cannot be imported; the message names its package.
    """
    found: dict[str, Any] = {}
    for point in sorted(entry_points(group=group), key=lambda p: p.name):
        try:
            found[point.name] = point.load()
        except Exception as error:
            package = point.dist.name if point.dist is not None else "unknown package"
            raise UsageError(
                f"entry point {point.name} of group {group} ({package}: {point.value}) "
                f"cannot be loaded: {type(error).__name__}: {error}",
                "what it would add is missing.",
                f"repair or uninstall {package}.",
            ) from error
    return found
