"""What a start asks the planner, where its recipe leaves a choice open with `auto`.

The planner lies above training and imports it, so training may not import the planner. This module
alone names it, as text, and loads it in a start that asks: a circle that import-linter does not
see, and the only one (`tests/test_library_names.py`). A rank is a process of its own, started by a
launcher as `python -m onellm_dist.train`, to which nobody above can hand the planner.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from onellm_dist.config.schema import RunConfig
from onellm_dist.data.packing import TokenBudget

PLANNER = "onellm_dist.planner.budgets"


class PlannedPlacement(Protocol):
    """Where frozen weights lie."""

    @property
    def config(self) -> RunConfig:
        """The recipe with `engine.frozen` decided."""

    @property
    def reason(self) -> str:
        """Why, in words."""


class StartPlanner(Protocol):
    """What a start asks about the devices at hand; `planner/budgets.py` documents it."""

    def find_budget(
        self,
        config: RunConfig,
        *,
        device_name: str,
        nodes: int,
        ranks_per_node: int,
        text_tokens: int,
        least: TokenBudget,
    ) -> TokenBudget:
        """Find the token budgets that fit a device and go fastest."""

    def find_placement(
        self,
        config: RunConfig,
        *,
        device_name: str,
        nodes: int,
        ranks_per_node: int,
        text_tokens: int,
    ) -> PlannedPlacement | None:
        """Decide where frozen weights lie; None: the device is unknown."""


def load_start_planner() -> StartPlanner:
    """Load the planner."""
    planner: Any = importlib.import_module(PLANNER)
    return cast("StartPlanner", planner)
