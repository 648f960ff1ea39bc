"""Which weights ZeRO-3 gives up after a module: looked up, not searched (DeepSpeed 0.19.8)."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from torch import nn

ListParameters = Callable[[Any, bool], Iterator[Any]]
_TABLES = "_onellm_reads"
"""Attribute of a coordinator: the order of modules that was read, and a table for each way to list
their parameters."""


class ReadTable:
    """Where in a step each weight is read, and how many elements are read before.

    Args:
        order: modules, as a step calls them forward and backward.
        list_parameters: (module, whether of all modules in it too) -> what the module reads.
        recurse: the latter.
    """

    def __init__(
        self, order: Sequence[nn.Module], list_parameters: ListParameters, recurse: bool
    ) -> None:
        self._places: dict[int, list[int]] = defaultdict(list)
        self._before = [0]
        for place, module in enumerate(order):
            elements = self._before[-1]
            for parameter in list_parameters(module, recurse):
                self._places[parameter.ds_id].append(place)
                elements += parameter.ds_numel
            self._before.append(elements)

    def is_read_soon(self, weight: int, place: int, distance: int) -> bool:
        """Whether a weight is read again before `distance` elements of others are.

        Args:
            weight: its `ds_id`.
            place: from this module of the order on.
            distance: number of elements.
        """
        places = self._places.get(weight, [])
        later = bisect_left(places, place)
        return later < len(places) and self._before[places[later]] - self._before[place] < distance


def quicken_release(coordinator: Any, list_parameters: ListParameters) -> None:
    """Make the coordinator look up what it gives up after a module.

    In the first steps DeepSpeed walks through the rest of the step for every call of a module,
    which is quadratic in their number: most of the second step of a small model. It keeps what it
    found, and so do we. A version that keeps its state under other names runs as it is.

    Args:
        coordinator: DeepSpeed's class of coordinators.
        list_parameters: as for `ReadTable`.
    """
    prefix = f"_{coordinator.__name__}__"
    search = f"{prefix}params_to_release"
    order, recent, distance = (
        f"{prefix}{name}"
        for name in (
            "submodule_order",
            "most_recent_step_id_param_fetched_for",
            "max_reuse_dist_in_numel",
        )
    )
    if search not in vars(coordinator) or not {order, recent, distance} <= set(
        coordinator.__init__.__code__.co_names
    ):
        return

    @cache  # as DeepSpeed does
    def look_up(self: Any, module: nn.Module, place: int) -> set[int]:
        if not self.is_complete_trace():
            raise RuntimeError("the modules of a step have not been recorded yet")
        is_leaf = bool(getattr(module, "_z3_leaf", False))
        table = _get_table(self, getattr(self, order), list_parameters, is_leaf)
        fetched, limit = getattr(self, recent), getattr(self, distance)
        return {
            parameter.ds_id
            for parameter in list_parameters(module, is_leaf)
            if not parameter.ds_persist
            and fetched[parameter] <= place
            and not table.is_read_soon(parameter.ds_id, place, limit)
        }

    setattr(coordinator, search, look_up)


def _get_table(
    coordinator: Any,
    order: Sequence[nn.Module],
    list_parameters: ListParameters,
    recurse: bool,
) -> ReadTable:
    known, tables = vars(coordinator).get(_TABLES, (None, {}))
    if known is not order:
        tables = {}
        vars(coordinator)[_TABLES] = order, tables
    if recurse not in tables:
        tables[recurse] = ReadTable(order, list_parameters, recurse)
    table: ReadTable = tables[recurse]
    return table
