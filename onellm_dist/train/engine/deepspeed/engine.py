"""ZeRO stages 0 to 3 through DeepSpeed (seen with 0.19.8).

Where a default of DeepSpeed does not fit, the code that corrects it says why.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from onellm_dist.model.adapters.lora import list_foreign_reads
from onellm_dist.packed import PackedBatch
from onellm_dist.train.engine.base import Engine, GradNorms, LocalRange, PackedLoss, WeightSource
from onellm_dist.train.engine.deepspeed.config import complete_config, get_zero_stage
from onellm_dist.train.engine.deepspeed.hooks import quicken_hooks
from onellm_dist.train.engine.deepspeed.leaves import name_leaves
from onellm_dist.train.engine.deepspeed.library_check import check_with_deepspeed
from onellm_dist.train.engine.deepspeed.process_groups import forget_process_groups
from onellm_dist.train.engine.deepspeed.ranges import (
    add_optimizer_state,
    find_flat_partitions,
    find_local_ranges,
    refresh_weights,
)
from onellm_dist.train.engine.deepspeed.weights import fill_partitioned, fill_replicated
from onellm_dist.train.engine.grad_norms import PartNorms
from onellm_dist.train.engine.parameters import (
    fill_groups,
    list_persistent_buffers,
    name_groups,
    set_learning_rates,
)
from onellm_dist.train.engine.settings import EngineSettings

COMPILER_SWITCH = "TORCHDYNAMO_DISABLE"
"""Variable that, if 1, makes `torch.compile` return what it is given (torch 2.11)."""


class DeepSpeedEngine(Engine):
    """One torch optimizer for every ZeRO stage, handed to DeepSpeed as the client's.

    DeepSpeed's own CPUAdam is compiled at run time and rounds differently from its GPU twin.
    torch's optimizers are there everywhere, and their state is plain tensors, which makes resumes
    exact.
    """

    def __init__(
        self,
        engine: Any,
        module: PackedLoss,
        optimizer: torch.optim.Optimizer,
        settings: EngineSettings,
    ) -> None:
        self._engine = engine
        self._module = module
        self._torch_optimizer = optimizer
        self._settings = settings
        self._stage = get_zero_stage(settings.options)
        self.device = settings.device
        self.optimizer = settings.optimizer
        self._flats = find_flat_partitions(engine, optimizer)
        add_optimizer_state(settings.optimizer, optimizer, self._flats)
        self._ranges = find_local_ranges(
            engine,
            module.model,
            optimizer,
            self._flats,
            rank=engine.global_rank,
            world_size=settings.world_size,
        )
        self._probe = min(
            (p for p in module.parameters() if p.requires_grad),
            key=self.numel,
        )
        """A small trainable parameter, whose gradient shows a loss that is not finite."""
        self._norms = PartNorms(module.model, self._ranges, settings.parts, settings.device)
        self._steps = 0

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        settings: EngineSettings,
        weights: WeightSource | None = None,
    ) -> DeepSpeedEngine:
        deepspeed = import_deepspeed()
        config = complete_config(settings.options, bf16=settings.bf16, grad_clip=settings.grad_clip)
        check_with_deepspeed(config)
        config = name_leaves(config, model)
        if weights is not None:
            names = name_groups(model, groups)
            dtype = settings.compute_dtype
            if get_zero_stage(config) == 3:
                fill_partitioned(model, weights, config, dtype, settings.device, deepspeed)
            else:
                fill_replicated(model, weights, dtype, settings.device)
            groups = fill_groups(names, dict(model.named_parameters()))
        if get_zero_stage(config) == 3:
            for reader, parameter in list_foreign_reads(model):
                deepspeed.zero.register_external_parameter(reader, parameter)
        module = PackedLoss(model)
        optimizer = settings.optimizer.build(groups)
        engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if get_zero_stage(config) == 3:
            quicken_hooks(module)
        return cls(engine, module, optimizer, settings)

    @staticmethod
    def numel(parameter: torch.Tensor) -> int:
        found: int = getattr(parameter, "ds_numel", parameter.numel())
        return found

    def forward(self, batch: PackedBatch, *, last: bool) -> tuple[torch.Tensor, ...]:
        self._engine.set_gradient_accumulation_boundary(last)
        found: tuple[torch.Tensor, ...] = self._engine(batch)
        return found

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> torch.Tensor:
        values: torch.Tensor = self._engine(batch, logits=True)
        return values

    def backward(self, loss: torch.Tensor, loss_count: int) -> None:
        # A loss that is not finite may still have finite gradients (an infinite cross-entropy, or a
        # pack of empty or skipped samples that reaches nothing that trains). Poison the probe's
        # gradient with NaN, so that every rank sees a norm that is not finite and skips the step,
        # without a message between ranks.
        poison = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        handle = self._probe.register_hook(lambda gradient: gradient * poison)
        # DeepSpeed averages over ranks; the factor turns that into the sum. scale_wrt_gas would
        # divide once more.
        self._engine.backward(
            loss * poison * (self._settings.world_size / loss_count), scale_wrt_gas=False
        )
        handle.remove()

    def grad_norms(self) -> GradNorms:
        return self._norms.read()

    def step(self, lr: float | Sequence[float], *, discard: bool = False) -> bool:
        set_learning_rates(self._engine.optimizer.param_groups, lr)
        if self._stage == 0:
            applied = self._step_without_zero(discard)
        else:
            with suspend_steps(self._torch_optimizer) if discard else nullcontext():
                self._engine.step()
            applied = bool(self._engine.was_step_applied()) and not discard
        self._steps += applied
        return applied

    def _step_without_zero(self, discard: bool) -> bool:
        parameters = [p for group in self._torch_optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self._settings.grad_clip or float("inf")))
        if discard or not math.isfinite(norm):
            self._engine.zero_grad()
            return False
        self._engine.step()
        return True

    def ranges(self) -> list[LocalRange]:
        return self._ranges

    @property
    def optimizer_steps(self) -> int:
        return self._steps

    def finish_restore(self, optimizer_steps: int) -> None:
        self._steps = optimizer_steps
        for flat in self._flats:
            self.optimizer.set_steps(self._torch_optimizer.state[flat], optimizer_steps)
        refresh_weights(self._engine, self.optimizer.state_keys)

    def close(self) -> None:
        forget_process_groups()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._settings.compute_dtype

    def full_weight_shapes(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        model = self._module.model
        found = [
            (name, tuple(getattr(p, "ds_shape", p.shape)), self.compute_dtype)
            for name, p in model.named_parameters()
        ]
        return found + [
            (name, tuple(b.shape), b.dtype) for name, b in list_persistent_buffers(model)
        ]

    @torch.no_grad()
    def full_weights(
        self, wants: Callable[[str], bool] = lambda _: True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        import deepspeed

        is_rank_zero = self._engine.global_rank == 0
        for name, parameter in self._module.model.named_parameters():
            if not wants(name):
                continue
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                full = (
                    parameter.detach().to("cpu", copy=True)
                    if is_rank_zero
                    else torch.empty_like(parameter, device="meta")
                )
            yield name, full
        for name, buffer in list_persistent_buffers(self._module.model):
            if not wants(name):
                continue
            yield (
                name,
                buffer.detach().to("cpu", copy=True)
                if is_rank_zero
                else torch.empty_like(buffer, device="meta"),
            )


@contextmanager
def suspend_steps(optimizer: Any) -> Iterator[None]:
    """Make `optimizer.step` do nothing while the context is open.

    DeepSpeed has no call that discards a finite gradient. Around the steps of the optimizer that it
    was handed, every ZeRO stage clears the gradient and copies the fp32 weights, here unchanged,
    into those that the model computes with.
    """
    optimizer.step = lambda: None  # hides the method of the class
    try:
        yield
    finally:
        del optimizer.step


def import_deepspeed() -> Any:
    """Import DeepSpeed, quiet, and on the CPU where there is no GPU.

    Its shared-memory all-reduce is switched off. It serves inference alone (0.19.8: only
    `inference_all_reduce` uses it), takes 70 s to compile on a fresh machine, and leaves 66 MiB per
    rank in /dev/shm when a run is killed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    from deepspeed.utils import logger, set_log_level_from_string

    set_log_level_from_string("warning")
    # Two warnings that do not concern us: PackedLoss returns plain tensors, and optimizers of ours
    # are elementwise.
    quiet = ("unknown inputs or outputs type", "untested optimizer")
    logger.addFilter(lambda record: not any(words in record.getMessage() for words in quiet))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon without compiling it.

    `deepspeed.initialize` imports it whatever the optimizer is (0.19.8:
    `is_zero_supported_optimizer`), and its decorators load torch's inductor: 2 s of CPU in every
    rank, for functions that nothing here calls.
    """
    before = os.environ.get(COMPILER_SWITCH)
    os.environ[COMPILER_SWITCH] = "1"
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ[COMPILER_SWITCH]
        if before is not None:
            os.environ[COMPILER_SWITCH] = before
