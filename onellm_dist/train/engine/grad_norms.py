"""The norm of the gradient, whole and by part of the model, from the ranges that each rank holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import distributed as dist
from torch import nn

from onellm_dist.train.engine.base import GradNorms, LocalRange

AT_ONCE = 2**26
"""Gradient elements looked at together (256 MiB): ZeRO-3 with an offloaded optimizer brings each from the host to the GPU (0.19.8)."""


class PartNorms:
    """Norms of the gradient, whole and by part.

    Args:
        model: its trainable parameters are those of `ranges`, over all ranks.
        parts: parameter name -> part; the same on every rank.
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
        place = {name: i for i, name in enumerate(self.names)}
        held = [r for r in ranges if r.length]
        self._batches = _batches(held)
        self._place = torch.tensor(
            [place[parts[r.name]] if r.name in parts else len(place) for r in held],
            dtype=torch.int64,
        )
        self._place, self._device = self._place.to(device), device

    @torch.no_grad()
    def read(self) -> GradNorms:
        """Of the gradient that the ranges hold now. Waits for the device. Called by all ranks."""
        squares = self._squares().tolist()
        by_part = {
            name: math.sqrt(square) for name, square in zip(self.names, squares, strict=False)
        }
        return GradNorms(math.sqrt(sum(squares)), by_part)

    def _squares(self) -> torch.Tensor:
        """[parts + 1] fp64 on the device: sums over all ranks; the last is of what belongs to no part."""
        sums = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=self._device)
        first = 0
        for few in self._batches:
            norms = (
                torch.stack(torch._foreach_norm([r.gradient().float() for r in few]))
                .double()
                .to(self._device)
            )
            sums.index_add_(0, self._place[first : first + len(few)], norms.square())
            first += len(few)
        dist.all_reduce(sums)
        return sums


def _batches(ranges: Sequence[LocalRange]) -> list[list[LocalRange]]:
    """In their order, each batch of at most `AT_ONCE` elements or of a single range."""
    found: list[list[LocalRange]] = []
    size = AT_ONCE
    for one in ranges:
        size += one.length
        if size > AT_ONCE:
            found.append([])
            size = one.length
        found[-1].append(one)
    return found
