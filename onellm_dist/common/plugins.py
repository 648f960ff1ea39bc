"""Entry points: modalities, sources, callbacks, optimizers and tasks of other packages."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from onellm_dist.common.errors import UsageError

MODALITIES = "onellm_dist.modalities"
SOURCES = "onellm_dist.sources"
CALLBACKS = "onellm_dist.callbacks"
OPTIMIZERS = "onellm_dist.optimizers"
TASKS = "onellm_dist.tasks"


def load_plugins(group: str) -> dict[str, Any]:
    """Load every entry point of a group.

    Args:
        group: one of the groups above.

    Returns:
        Name of the entry point to the object it names, in order of name.

    Raises:
        UsageError: an entry point cannot be imported, or two packages use one name; the message
            names the packages.
    """
    found: dict[str, Any] = {}
    points: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda p: (p.name, p.value)):
        if point.name in points:
            raise UsageError(
                f"two packages have an entry point {point.name} of the group {group}: "
                f"{_describe(points[point.name])} and {_describe(point)}",
                "only one of them could be used.",
                "uninstall one of the packages.",
            )
        points[point.name] = point
        try:
            found[point.name] = point.load()
        except Exception as error:
            raise UsageError(
                f"entry point {point.name} of group {group} ({_describe(point)}) "
                f"cannot be loaded: {type(error).__name__}: {error}",
                "what it would add is missing.",
                "repair or uninstall its package.",
            ) from error
    return found


def import_class(name: str, base: type, *, key: str, why: str) -> Any:
    """Import the class that a recipe names as `module:Class`.

    Args:
        name: `module:Class`.
        base: the class must derive from it.
        key: the recipe's key, for the message.
        why: what would be missing without the class, for the message.

    Raises:
        UsageError: it cannot be imported, or does not derive from `base`.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_user_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{key}: {name} cannot be imported: {error}", why, "check PYTHONPATH."
        ) from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(
            f"{key}: {name} is not a subclass of {base.__module__}.{base.__qualname__}",
            "it does not have the methods that are called.",
            f"derive it from {base.__qualname__}.",
        )
    return found


def import_user_module(name: str) -> ModuleType:
    """Import a module that a recipe names; the working directory is the last place to look."""
    _add_working_directory()
    return import_module(name)


def _add_working_directory() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def find_module(name: str, *, key: str) -> None:
    """Look for the module of `module:Class` without importing it.

    Args:
        name: `module:Class`.
        key: the recipe's key, for the message.

    Raises:
        UsageError: there is no such module.
    """
    module = name.partition(":")[0]
    _add_working_directory()
    try:
        found = find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise UsageError(
            f"{key}: {name} cannot be imported: no module named {module}",
            "the run would go without it.",
            "check PYTHONPATH.",
        )


def _describe(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else "unknown package"
    return f"{package}: {point.value}"
