"""Which tasks there are: the files of this folder and the entry points of other packages."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache

from onellm_dist.common.errors import UsageError
from onellm_dist.common.plugins import TASKS, load_plugins
from onellm_dist.evaluation.tasks.base import Task


@cache
def all_tasks() -> dict[str, Task]:
    """Find all tasks, once per process.

    Returns:
        Name to task, in order of name.

    Raises:
        UsageError: an entry point cannot be loaded or is not a task, or two tasks share a name.
    """
    found: dict[str, tuple[str, Task]] = {}
    for place, task in (*_find_in_package(), *_find_in_entry_points()):
        if task.name in found:
            raise UsageError(
                f"two tasks have the name {task.name!r}: {found[task.name][0]} and {place}",
                "the name selects a task.",
                "give one of them another name, or uninstall the package that adds it.",
            )
        found[task.name] = (place, task)
    return {name: found[name][1] for name in sorted(found)}


def get_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        UsageError: there is no such task.
    """
    try:
        return all_tasks()[name]
    except KeyError:
        raise UsageError(
            f"unknown task {name!r}",
            "neither a file in onellm_dist/evaluation/tasks/ nor an entry point of the group "
            f"{TASKS} defines it.",
            f"use one of: {', '.join(all_tasks())}.",
        ) from None


def _find_in_package() -> Iterator[tuple[str, Task]]:
    """Yield place and task for every module of this folder that has a `TASK`."""
    for info in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        if info.name == "registry":
            continue
        module = importlib.import_module(f"{__package__}.{info.name}")
        if hasattr(module, "TASK"):
            yield module.__name__, module.TASK


def _find_in_entry_points() -> Iterator[tuple[str, Task]]:
    """Yield place and task for every entry point of the group."""
    for name, loaded in load_plugins(TASKS).items():
        place = f"entry point {name} of group {TASKS}"
        task = getattr(loaded, "TASK", loaded)
        if not isinstance(task, Task):
            raise UsageError(
                f"{place} is a {type(loaded).__name__}, not a task",
                "it must be a module with a TASK, or a Task.",
                "correct the entry point, or uninstall its package.",
            )
        yield place, task
