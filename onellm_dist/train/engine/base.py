"""What the loop asks of an engine. One file beside this one is one engine; nothing else names DeepSpeed or FSDP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from onellm_dist.packed import PackedBatch

MASTER = "master"
STATE_KEYS = (MASTER, "exp_avg", "exp_avg_sq")
"""What a checkpoint holds of every trainable element, each fp32."""


@dataclass(frozen=True)
class GradNorms:
    """Norms of a step's gradient, summed over the ranks, before clipping; the same on every rank."""

    whole: float
    """inf or nan where an element is not finite."""
    by_part: dict[str, float] = field(default_factory=dict)
    """Of each part that `EngineSettings.parts` names, alone; their squares add up to that of `whole`, but for what is in no part."""


class WeightSource(Protocol):
    """Where the values of a model that is still on the meta device come from; every rank has one, with the same values."""

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of the parameter `name` along its first dimension (all of them where it has none), in any dtype."""


class LocalRange(ABC):
    """The part of one trainable parameter whose fp32 weight and Adam moments this rank holds: a contiguous range."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element of the range in the flattened parameter."""
    length: int

    @abstractmethod
    def read(self, key: str) -> torch.Tensor:
        """[length] fp32: the current values of `key` (one of STATE_KEYS), where they lie (a view), or a copy beside them on the host."""

    @abstractmethod
    def write(self, key: str, values: torch.Tensor) -> None:
        """Replace the values of `key` by `values` [length] fp32. `Engine.restored` must follow."""

    @abstractmethod
    def gradient(self) -> torch.Tensor:
        """[length], any floating dtype: the gradient summed over ranks; between the last backward of a step and `Engine.step`."""


class PackedLoss(nn.Module):
    """The model with plain tensors as its output, so that the engines' hooks on outputs see them (a dataclass hides them)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, batch: PackedBatch, *, logits: bool = False) -> Any:
        """A pack -> (loss [] fp32: the sum, nll [N], sample_index [N]); `logits`: [N, V] of the supervised tokens instead."""
        if logits:
            return self.model.compute_packed_logits(batch)[0]
        out = self.model(packed=batch)
        return out.loss, out.nll, out.sample_index


class Engine(ABC):
    """Shards a model over the ranks and steps it. `wrap` builds one; every method is called by all ranks together."""

    device: torch.device

    @classmethod
    @abstractmethod
    def wrap(
        cls,
        model: nn.Module,
        groups: Sequence[dict[str, object]],
        settings: EngineSettings,
        weights: WeightSource | None = None,
    ) -> Engine:
        """Shard `model`, whose frozen parameters have requires_grad False already. Its parameters may be replaced by others.

        Args:
            model: takes `packed=`; its weights are the same on every rank, or it is on the meta device (its buffers are not).
            groups: the optimizer's parameter groups (`params`, `weight_decay`).
            weights: what a model on the meta device is filled from, parameter by parameter, so that no rank ever holds all of it.
        """

    @abstractmethod
    def forward(
        self, batch: PackedBatch, *, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run one micro-batch; `last`: the optimizer step follows it. Returns what PackedLoss returns."""

    @abstractmethod
    def logits(self, batch: PackedBatch) -> torch.Tensor:
        """[N, V] logits of the supervised tokens of a pack, by the same modules as `forward`; without gradient."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, global_valid_tokens: int) -> None:
        """Add the gradients of `sum over ranks and micro-steps of loss / global_valid_tokens`, exactly (no averaging over ranks)."""

    @abstractmethod
    def grad_norms(self) -> GradNorms:
        """Of the gradient that `step` is about to apply: after the last backward. Waits for the device."""

    @abstractmethod
    def step(self, lr: float, *, discard: bool = False) -> bool:
        """Clip, and apply AdamW with this rate. With `discard`, or where the gradient is not finite, throw it away instead: weights,
        moments and the count of steps stay as they are, bit for bit. Either way the gradient is gone.

        Returns:
            Whether it was applied; the same on every rank.
        """

    @abstractmethod
    def ranges(self) -> list[LocalRange]:
        """What this rank holds. Over all ranks every trainable element is held exactly once."""

    @property
    @abstractmethod
    def optimizer_steps(self) -> int:
        """Steps applied so far (Adam's bias correction counts them)."""

    @abstractmethod
    def restored(self, optimizer_steps: int) -> None:
        """After writing ranges: bring the weights the model computes with up to date, and set the count of steps."""

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype:
        """Of the weights that the model computes with."""

    @abstractmethod
    def whole_shapes(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of each of `whole_weights`, in its order."""

    @abstractmethod
    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight and persistent buffer in turn, whole, in the dtype the model computes in: on the CPU on rank 0, a tensor on
        the meta device elsewhere. Every rank must run it to its end. Tied weights come once.
        """

    def gather_full_state(self) -> dict[str, torch.Tensor]:
        """All of `whole_weights` at once: rank 0; {} elsewhere."""
        return {name: tensor for name, tensor in self.whole_weights() if not tensor.is_meta}


@dataclass(frozen=True)
class EngineSettings:
    """What the recipe says to an engine."""

    world: int
    device: torch.device
    bf16: bool
    betas: tuple[float, float]
    eps: float
    grad_clip: float
    config: dict[str, object]
    """The engine's own configuration (the DeepSpeed JSON; nothing for FSDP2)."""
    shard_ranks: int | None = None
    """FSDP2: ranks that a parameter is sharded over; groups of so many hold the same shards. None: all ranks."""
    reduce_every_micro_batch: bool = True
    """FSDP2: reduce gradients after every micro-step (a shard of them is kept), or once a step (all of them are kept, less traffic)."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Parameter name -> the part of the model whose gradient norm it counts in; parameters that are not named count in none."""
