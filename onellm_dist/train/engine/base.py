"""What training asks of an engine.

Each folder beside this file is one engine; no other part of the package names its library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from onellm_dist.packed import PackedBatch

if TYPE_CHECKING:
    from onellm_dist.train.engine.settings import EngineSettings
    from onellm_dist.train.optim.base import OptimizerComponent

MASTER = "master"
"""State key of the fp32 weight; the other keys are the optimizer's."""


@dataclass(frozen=True)
class GradNorms:
    """Norms of a step's gradient over all ranks, before clipping; the same on every rank."""

    total: float
    """Norm of the whole gradient; inf or nan if an element is not finite."""
    by_part: dict[str, float] = field(default_factory=dict)
    """Norm of each part that `EngineSettings.parts` names. Their squares add up to that of `total`,
    except for parameters that belong to no part."""


class WeightSource(Protocol):
    """Values for a model on the meta device; every rank has a source, with the same values."""

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Read rows [first, end) of the parameter `name`, in any dtype; of a scalar, all."""


class ShardedModel(ABC):
    """A model that answers, of which each rank of the default process group holds a share.

    Args:
        model: the model, on the meta device; its parameters get shards of `weights`.
        weights: its weights; every rank reads its own rows of them.
        device: where the shards lie.
        dtype: their dtype.
    """

    model: Any
    """The model; its modules are called within `run` alone."""

    @abstractmethod
    def __init__(
        self, model: nn.Module, weights: WeightSource, device: torch.device, dtype: torch.dtype
    ) -> None: ...

    @abstractmethod
    def run(self, call: Callable[[], Any]) -> Any:
        """Run a function that calls the model; all ranks do at once, with the same inputs."""

    @abstractmethod
    def count_weights(self) -> tuple[int, int]:
        """How many weights lie on this rank between calls, and how many the model has."""


class LocalRange(ABC):
    """A contiguous range of a trainable parameter, whose weight and state this rank holds."""

    name: str
    """Name of the parameter in the model."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the range in the flattened parameter."""
    length: int
    """Number of elements."""

    @abstractmethod
    def read(self, key: str) -> torch.Tensor:
        """Return the current values of a state key.

        Args:
            key: one of `Engine.state_keys`.

        Returns:
            [length] fp32: a view of the values where they lie, or a copy beside them on the host.
        """

    @abstractmethod
    def write(self, key: str, values: torch.Tensor) -> None:
        """Replace the values of a state key; `Engine.finish_restore` must follow.

        Args:
            key: one of `Engine.state_keys`.
            values: [length] fp32.
        """

    @abstractmethod
    def gradient(self) -> torch.Tensor:
        """Return the gradient summed over ranks, [length], in any floating dtype.

        Valid between the last backward pass of a step and `Engine.step`.
        """


class PackedLoss(nn.Module):
    """The model with plain tensors as its output.

    Engines hook output tensors, and a dataclass would hide them.

    Args:
        model: a model that takes `packed=`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, batch: PackedBatch, *, logits: bool = False) -> Any:
        """Run the model on a pack.

        Args:
            batch: a pack of T tokens, N of them supervised.
            logits: return the logits of the supervised tokens, [N, V], instead.

        Returns:
            (loss [] fp32, summed over tokens; nll [N]; sample_index [N]); of pairs of answers the
            loss and nll of pairs, and fourth their rewards [N, 2].
        """
        if logits:
            return self.model.compute_packed_logits(batch)[0]
        out = self.model(packed=batch)
        found = out.loss, out.nll, out.sample_index
        return found if getattr(out, "rewards", None) is None else (*found, out.rewards)


class Engine(ABC):
    """Shards a model over the ranks and steps it.

    `wrap` builds one; all ranks call every method together.
    """

    device: torch.device
    """Where the model computes."""
    optimizer: OptimizerComponent
    """The optimizer, which names the state that it keeps."""

    @classmethod
    @abstractmethod
    def wrap(
        cls,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        settings: EngineSettings,
        weights: WeightSource | None = None,
    ) -> Engine:
        """Shard a model whose frozen parameters have requires_grad False already.

        Args:
            model: takes `packed=`. Its weights are the same on every rank, or it is on the meta
                device (its buffers are not). Its parameters may be replaced by others.
            groups: the optimizer's parameter groups (`params`, `weight_decay`).
            settings: what the recipe says.
            weights: fills a model on the meta device parameter by parameter, so that no rank ever
                holds all of it.
        """

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Keys of the fp32 values that a checkpoint holds per trainable element."""
        return (MASTER, *self.optimizer.state_keys)

    @staticmethod
    def numel(parameter: torch.Tensor) -> int:
        """Number of elements of a parameter of the model, of which this rank may hold a part."""
        return parameter.numel()

    @abstractmethod
    def forward(self, batch: PackedBatch, *, last: bool) -> tuple[torch.Tensor, ...]:
        """Run one micro-batch; returns what `PackedLoss` returns.

        Args:
            batch: this rank's pack.
            last: whether the optimizer step follows this micro-batch.
        """

    @abstractmethod
    def logits(self, batch: PackedBatch) -> torch.Tensor:
        """Return the logits of a pack's supervised tokens, [N, V], without gradient.

        They are computed by the same modules as in `forward`.
        """

    @abstractmethod
    def backward(self, loss: torch.Tensor, loss_count: int) -> None:
        """Add the gradient of `loss / loss_count`.

        Over ranks and micro-batches gradients are summed, not averaged.
        """

    @abstractmethod
    def grad_norms(self) -> GradNorms:
        """Return the norms of the gradient that `step` is about to apply.

        Waits for the device.
        """

    @abstractmethod
    def step(self, lr: float | Sequence[float], *, discard: bool = False) -> bool:
        """Clip the gradient and apply the optimizer. Either way the gradient is gone afterwards.

        Args:
            lr: learning rate of this step, or one for each of the parameter groups.
            discard: skip the step. It is also skipped if the gradient is not finite. Weights,
                optimizer state and the number of steps then stay as they are, bit for bit.

        Returns:
            Whether the step was applied; the same on every rank.
        """

    @abstractmethod
    def ranges(self) -> list[LocalRange]:
        """Return what this rank holds; over all ranks, every trainable element is held once."""

    @property
    @abstractmethod
    def optimizer_steps(self) -> int:
        """Number of steps applied so far (AdamW's bias correction counts them)."""

    @abstractmethod
    def finish_restore(self, optimizer_steps: int) -> None:
        """Follow up on written ranges.

        Update the weights that the model computes with, and set the number of applied steps.
        """

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the weights that the model computes with."""

    @abstractmethod
    def full_weight_shapes(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Return name, shape and dtype of each of `full_weights`, in its order."""

    @abstractmethod
    def full_weights(
        self, wants: Callable[[str], bool] = lambda _: True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Gather each weight and persistent buffer in turn.

        They come in the dtype that the model computes in, tied weights once. Every rank must run
        the iterator to its end.

        Args:
            wants: whether a weight is gathered, by its name; the same on every rank.

        Yields:
            (name, tensor): on the CPU on rank 0; on the meta device on other ranks.
        """

    def close(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Forget what the engine's library keeps of the process group, which is about to go."""
