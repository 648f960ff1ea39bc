"""The ranks and the engine of a run of one rank that has no process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from onellm_dist.train.distributed import Distributed


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

    ask_rank_zero = Distributed.ask_rank_zero
    call_together = Distributed.call_together
    _describe = Distributed._describe

    def barrier(self) -> None:
        return None

    def sum(self, tensor: torch.Tensor) -> None:
        return None


ONE_RANK: Any = OneRank()


class OneRankEngine:
    """What `export_model` asks an engine for, on one rank."""

    compute_dtype = torch.float32

    def __init__(self, model: Any) -> None:
        self._state = {name: p.detach() for name, p in model.named_parameters()}

    def full_weights(
        self, wants: Callable[[str], bool] = lambda _: True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, value) for name, value in self._state.items() if wants(name))

    def full_weight_shapes(self) -> list[tuple[str, torch.Size, torch.dtype]]:
        return [(name, p.shape, p.dtype) for name, p in self._state.items()]
