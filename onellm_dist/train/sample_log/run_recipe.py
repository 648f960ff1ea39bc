"""What the look-ups of the sample log need of a run's `config.yaml` and `samples/datasets.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from onellm_dist.common.errors import OneLLMError
from onellm_dist.config.schema import MOST_STEPS


class RunRecipe(NamedTuple):
    """What is read of the recipe of a run."""

    steps: int
    """`train.steps`."""
    locations: Mapping[str, str]
    """Dataset -> path or URL, as the mixture names it. A dataset's folder usually has its name."""


def read_run_recipe(path: Path) -> RunRecipe:
    """Read `config.yaml`.

    Raises:
        FileNotFoundError: there is none.
        OneLLMError: it is damaged.
    """
    try:
        config: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        steps, data = config["train"]["steps"], config["data"]
        root, paths = data["root"], [entry["path"] for entry in data["mixture"]]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise _make_error(path, f"{type(error).__name__}: {error}") from None
    if type(steps) is not int or not 0 < steps <= MOST_STEPS:
        raise _make_error(path, "train.steps is not a number of steps")
    if not all(isinstance(text, str) for text in (root, *paths)):
        raise _make_error(path, "data.root, or a path of data.mixture, is not a text")
    locations: dict[str, str] = {}
    for location in paths:
        absolute = "://" in location or location.startswith("/")
        name = re.split(r"[/\\]", location.rstrip("/"))[-1]
        locations[name] = location if absolute else f"{root.rstrip('/')}/{location}"
    return RunRecipe(steps, locations)


def read_recorded_locations(path: Path) -> dict[str, str]:
    """Read `samples/datasets.json`: dataset -> path or URL; {} where there is none.

    Raises:
        OneLLMError: it is damaged.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _make_error(path, str(error)) from None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise _make_error(path, "it is not an object of paths")
    return found


def _make_error(path: Path, problem: str) -> OneLLMError:
    return OneLLMError(
        f"{path}: damaged: {problem}",
        "the samples of the run are computed from it.",
        "restore it from a copy; a start of the run writes it again.",
    )
