"""The lengths of the sequences in a pack, on the host and as cumulative lengths on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch


def to_device_tensor(
    values: Any, device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Copy host numbers to `device`; page-locked memory keeps the copy from draining a GPU's queue.

    Args:
        values: anything that `torch.as_tensor` takes.
        device: where the tensor is needed.
        dtype: dtype of the tensor.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


@dataclass(frozen=True)
class SequenceLengths:
    """Where each of the n sequences of a pack begins and ends.

    Query and key lengths differ only in the last block of the UPM, which computes the query
    positions alone.

    Attributes:
        q_lengths: query tokens of each sequence, on the host.
        k_lengths: key tokens of each sequence, on the host.
        cu_seqlens_q: [n + 1] int32, cumulative query lengths on the device.
        cu_seqlens_k: [n + 1] int32, cumulative key lengths on the device.
    """

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor

    @classmethod
    def from_lengths(
        cls,
        q_lengths: Sequence[int],
        k_lengths: Sequence[int] | None = None,
        *,
        device: torch.device,
    ) -> SequenceLengths:
        """Build from host lengths, without waiting for the device.

        Args:
            q_lengths: query tokens of each sequence.
            k_lengths: key tokens of each sequence; default: `q_lengths`.
            device: device of the cumulative lengths.

        Raises:
            ValueError: there are not as many key lengths as query lengths.
        """
        q = tuple(q_lengths)
        cu_seqlens_q = _accumulate(q, device)
        if k_lengths is None or tuple(k_lengths) == q:
            return cls(q, q, cu_seqlens_q, cu_seqlens_q)
        k = tuple(k_lengths)
        if len(k) != len(q):
            raise ValueError(f"{len(q)} query lengths but {len(k)} key lengths")
        return cls(q, k, cu_seqlens_q, _accumulate(k, device))

    def to(self, device: Any, *, non_blocking: bool = False) -> SequenceLengths:
        """Copy the lengths to another device (accelerate calls it, as it does a tensor's).

        Args:
            device: as of torch.
            non_blocking: as of torch.
        """
        q = self.cu_seqlens_q.to(device, non_blocking=non_blocking)
        if q.device == self.cu_seqlens_q.device:
            return self
        same = self.cu_seqlens_k is self.cu_seqlens_q
        k = q if same else self.cu_seqlens_k.to(device, non_blocking=non_blocking)
        return SequenceLengths(self.q_lengths, self.k_lengths, q, k)

    @property
    def max_seqlen_q(self) -> int:
        """Query tokens of the longest sequence; 0 for an empty pack."""
        return max(self.q_lengths, default=0)

    @property
    def max_seqlen_k(self) -> int:
        """Key tokens of the longest sequence; 0 for an empty pack."""
        return max(self.k_lengths, default=0)

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """Neighbouring sequences of equal lengths: (sequences, query tokens, key tokens) each."""
        return [
            (len(list(members)), q, k)
            for (q, k), members in groupby(zip(self.q_lengths, self.k_lengths, strict=True))
        ]

    @cached_property
    def buckets(self) -> list[tuple[int, int, torch.Tensor]]:
        """Sequences of similar lengths, padded together for causal attention.

        A bucket holds the sequences whose lengths round up to the same power of two. Each bucket
        is (sequences, padded length, [sequences * padded length] rows of the pack). Padding rows
        are -1; they stand behind a sequence's end, where causality hides them from real tokens.
        """
        starts = torch.tensor((0, *self.q_lengths)).cumsum(0)
        buckets = []
        for _, indices in groupby(
            sorted(range(len(self.q_lengths)), key=lambda i: self.q_lengths[i]),
            key=lambda i: (self.q_lengths[i] - 1).bit_length(),
        ):
            members = list(indices)
            lengths = torch.tensor([self.q_lengths[i] for i in members])
            column = torch.arange(int(lengths.max()))
            rows = torch.where(column < lengths[:, None], starts[members][:, None] + column, -1)
            buckets.append((len(members), len(column), rows.flatten()))
        return buckets

    @cached_property
    def bucket_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices that gather a pack into its buckets, and indices that gather it back.

        Returns:
            (rows of the pack that fill the buckets, padding reads row 0; [T] place of each token
            of the pack in the buckets), both int64 on the device.
        """
        empty = torch.empty(0, dtype=torch.int64)
        rows = torch.cat([empty, *(bucket[2] for bucket in self.buckets)])
        back = torch.empty(sum(self.q_lengths), dtype=torch.int64)
        real = rows >= 0
        back[rows[real]] = torch.arange(len(rows))[real]
        device = self.cu_seqlens_q.device
        return to_device_tensor(rows.clamp(min=0), device), to_device_tensor(back, device)


def _accumulate(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return to_device_tensor(torch.tensor((0, *lengths)).cumsum(0), device, torch.int32)
