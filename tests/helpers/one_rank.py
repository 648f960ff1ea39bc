"""The ranks of a run of one rank that has no process group."""

from __future__ import annotations

from typing import Any

import torch


class OneRank:
    """Stands in for `Distributed`: one rank, no process group."""

    rank = 0
    world_size = 1
    local_world_size = 1
    is_rank_zero = True
    device = torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        return None

    def sum(self, tensor: torch.Tensor) -> None:
        return None


ONE_RANK: Any = OneRank()
