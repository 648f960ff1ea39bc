"""Norms of the gradient, total and by part of the model, from the ranges that each rank holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import distributed as dist
from torch import nn

from onellm_dist.train.engine.base import GradNorms, LocalRange

ELEMENTS_AT_ONCE = 2**26
"""Gradient elements that are reduced together (256 MiB). An offloading engine may bring each of
them from the host to the GPU first (ZeRO-3 with DeepSpeed 0.19.8 does)."""


class PartNorms:
    """Computes the norms of the gradient, total and by part.

    Args:
        model: its trainable parameters are those of `ranges`, over all ranks.
        ranges: what this rank holds.
        parts: parameter name to part; the same on every rank.
        device: where the sums are reduced.
    """

    def __init__(
        self,
        model: nn.Module,
        ranges: Sequence[LocalRange],
        parts: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self.names = sorted(
            {
                parts[name]
                for name, p in model.named_parameters()
                if p.requires_grad and name in parts
            }
        )
        index = {name: i for i, name in enumerate(self.names)}
        held = [r for r in ranges if r.length]
        self._batches = _group_ranges(held)
        self._device = device
        self._part_of_range = torch.tensor(
            [index[parts[r.name]] if r.name in parts else len(index) for r in held],
            dtype=torch.int64,
        ).to(device)

    @torch.no_grad()
    def read(self) -> GradNorms:
        """Compute the norms of the gradient that the ranges hold now.

        All ranks call it; it waits for the device.
        """
        squares = self._squares().tolist()
        by_part = {
            name: math.sqrt(square) for name, square in zip(self.names, squares, strict=False)
        }
        return GradNorms(math.sqrt(sum(squares)), by_part)

    def _squares(self) -> torch.Tensor:
        """[parts + 1] fp64, summed over all ranks; the last sum is of what belongs to no part."""
        sums = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=self._device)
        first = 0
        for batch in self._batches:
            norms = (
                torch.stack(torch._foreach_norm([r.gradient().float() for r in batch]))
                .double()
                .to(self._device)
            )
            sums.index_add_(0, self._part_of_range[first : first + len(batch)], norms.square())
            first += len(batch)
        dist.all_reduce(sums)
        return sums


def _group_ranges(ranges: Sequence[LocalRange]) -> list[list[LocalRange]]:
    """Split ranges into batches of at most `ELEMENTS_AT_ONCE` elements or of a single range."""
    found: list[list[LocalRange]] = []
    size = ELEMENTS_AT_ONCE
    for one in ranges:
        size += one.length
        if size > ELEMENTS_AT_ONCE:
            found.append([])
            size = one.length
        found[-1].append(one)
    return found
