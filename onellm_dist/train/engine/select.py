"""The engines of the package, by name. Importing this loads no engine's library."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from onellm_dist.common.errors import UsageError
from onellm_dist.train import engine as package
from onellm_dist.train.engine.description import EngineDescription


@cache
def all_engines() -> dict[str, EngineDescription]:
    """Name to description of every engine: each folder of `train/engine/` is one."""
    found: dict[str, EngineDescription] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.ispkg:
            module = importlib.import_module(f"{package.__name__}.{info.name}.description")
            description: EngineDescription = module.DESCRIPTION
            found[description.name] = description
    return found


def get_engine(name: str) -> EngineDescription:
    """The engine that a recipe names in `engine.name`.

    Raises:
        UsageError: there is no such engine.
    """
    try:
        return all_engines()[name]
    except KeyError:
        raise UsageError(
            f"engine.name={name}: unknown engine",
            "nothing can shard the model.",
            f"use one of: {', '.join(all_engines())}.",
        ) from None
