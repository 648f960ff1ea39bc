"""Source texts of modules, from disk or from the file that a model carries them in."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec


def read_source(name: str) -> str | None:
    """The text of a module; None: there is no such module, or it has no text.

    Args:
        name: the module's full name.
    """
    spec = find_spec(name)
    source = getattr(spec.loader, "get_source", None) if spec is not None else None
    text: str | None = source(name) if source is not None else None
    return text


def list_modules(package: str, starts: Iterable[str] = ("",)) -> list[str]:
    """Full names of the modules of a package, sorted.

    Args:
        package: the package's full name.
        starts: beginnings of the names that are listed.
    """
    found = (info.name for info in pkgutil.iter_modules(import_module(package).__path__))
    return sorted(f"{package}.{name}" for name in found if name.startswith(tuple(starts)))
