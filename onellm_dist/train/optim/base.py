"""What engines and checkpoints ask of an optimizer: a name, a builder, its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from onellm_dist.common.errors import UsageError
from onellm_dist.config.train_sections import OptimSection

if TYPE_CHECKING:
    import torch

OWNED_KEYS = ("betas", "eps")
"""Keys of the `optim` section that only some optimizers read."""


class NoOptions(BaseModel):
    """`optim.options` of an optimizer that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerComponent(ABC):
    """An elementwise optimizer: how it is built, and which state it keeps per trainable element.

    Elementwise means that the update of an element depends on the weight, gradient and state of
    that element alone. Each rank may then step the ranges that it holds, and any number of ranks
    continues a checkpoint. (LAMB, Muon and Shampoo are not elementwise.)

    Args:
        optim: the recipe's `optim` section.

    Raises:
        UsageError: the section sets a key that this optimizer does not read, or `optim.options` is
            wrong.
    """

    name: ClassVar[str]
    """The value of `optim.name`."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Keys of `OWNED_KEYS` that the optimizer reads; others must keep their defaults."""
    options_model: ClassVar[type[BaseModel]] = NoOptions
    """What `optim.options` may hold."""
    counts_steps: ClassVar[bool] = False
    """Whether the optimizer's state has a number of steps, `step` (fp32, []), beside the state of
    the elements."""
    state_keys: tuple[str, ...] = ()
    """Names of its state tensors, each fp32 and of the shape of the parameter, as torch's optimizer
    names them."""

    def __init__(self, optim: OptimSection) -> None:
        self.optim = optim
        self.options: Any = self._read_options()
        for key in OWNED_KEYS:
            default = OptimSection.model_fields[key].default
            if key not in self.reads and getattr(optim, key) != default:
                raise UsageError(
                    f"optim.{key} is not read by optim.name={self.name}",
                    "the recipe would say something that does not hold.",
                    f"remove optim.{key}; the optimizer's own settings are in optim.options.",
                )

    @abstractmethod
    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build torch's optimizer over parameter groups (`params`, `weight_decay`).

        Its learning rate is 0: the engine sets the rate of every step.
        """

    def add_state(self, state: MutableMapping[str, Any], values: torch.Tensor) -> None:
        """Add to `state` what the first step would create for `values`.

        Fresh and resumed runs then look alike.
        """
        import torch

        if self.counts_steps and state.get("step") is None:
            state["step"] = torch.zeros((), dtype=torch.float32, device=values.device)
        for key in self.state_keys:
            if state.get(key) is None:
                state[key] = torch.zeros_like(values, requires_grad=False)

    def set_steps(self, state: MutableMapping[str, Any], steps: int) -> None:
        """Set the number of steps that were applied, where the state has one."""
        if self.counts_steps:
            state["step"].fill_(steps)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's manifest says about the optimizer."""
        return {"name": self.name, "state_keys": list(self.state_keys)}

    def _read_options(self) -> BaseModel:
        try:
            return self.options_model.model_validate(self.optim.options)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
                for problem in error.errors()
            )
            known = ", ".join(self.options_model.model_fields) or "none"
            raise UsageError(
                f"optim.options of optim.name={self.name}: {problems}",
                "the optimizer cannot be built.",
                f"its options: {known}.",
            ) from None
