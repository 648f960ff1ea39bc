"""ZeRO 0 to 3 through DeepSpeed (seen with 0.19.8). What it gets wrong by default is set right here, each with a word why."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from onellm_dist.packed import PackedBatch
from onellm_dist.train.engine.base import (
    Engine,
    EngineSettings,
    GradNorms,
    LocalRange,
    PackedLoss,
    WeightSource,
)
from onellm_dist.train.engine.deepspeed.config import complete, zero_stage
from onellm_dist.train.engine.deepspeed.ranges import (
    create_optimizer_state,
    flat_partitions,
    local_ranges,
    refresh_weights,
)
from onellm_dist.train.engine.deepspeed.weights import fill_partitioned, fill_whole
from onellm_dist.train.engine.grad_norms import PartNorms
from onellm_dist.train.engine.parameters import grouped, named_groups, persistent_buffers


class DeepSpeedEngine(Engine):
    """One optimizer for every ZeRO stage: torch's fused AdamW, handed to DeepSpeed as the client's.

    DeepSpeed's own CPUAdam is compiled at run time and has other rounding than its GPU twin; torch's is there everywhere,
    and its state is three plain tensors, which is what makes resumes exact.
    """

    def __init__(
        self,
        engine: Any,
        module: PackedLoss,
        optimizer: torch.optim.Optimizer,
        settings: EngineSettings,
    ) -> None:
        self._engine, self._module, self._optimizer, self._settings = (
            engine,
            module,
            optimizer,
            settings,
        )
        self._stage = zero_stage(settings.config)
        self.device = settings.device
        self._flats = flat_partitions(engine, optimizer)
        create_optimizer_state(optimizer, self._flats)
        self._ranges = local_ranges(
            engine,
            module.model,
            optimizer,
            self._flats,
            rank=engine.global_rank,
            world=settings.world,
        )
        self._witness = min(
            (p for p in module.parameters() if p.requires_grad),
            key=lambda p: getattr(p, "ds_numel", p.numel()),
        )
        """A small parameter that trains, whose gradient shows a loss that is not finite."""
        self._norms = PartNorms(module.model, self._ranges, settings.parts, settings.device)

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        groups: Sequence[dict[str, object]],
        settings: EngineSettings,
        weights: WeightSource | None = None,
    ) -> DeepSpeedEngine:
        deepspeed = import_deepspeed()
        config = complete(settings.config, bf16=settings.bf16, grad_clip=settings.grad_clip)
        if weights is not None:
            names = named_groups(model, groups)
            dtype = torch.bfloat16 if settings.bf16 else torch.float32
            if zero_stage(config) == 3:
                fill_partitioned(model, weights, config, dtype, settings.device, deepspeed)
            else:
                fill_whole(model, weights, dtype, settings.device)
            groups = grouped(names, dict(model.named_parameters()))
        module = PackedLoss(model)
        optimizer = torch.optim.AdamW(
            list(groups), lr=0.0, betas=settings.betas, eps=settings.eps, fused=True
        )
        engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        return cls(engine, module, optimizer, settings)

    def forward(
        self, batch: PackedBatch, *, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, nll, sample_index = self._engine(batch)
        return loss, nll, sample_index

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> torch.Tensor:
        values: torch.Tensor = self._engine(batch, logits=True)
        return values

    def backward(self, loss: torch.Tensor, global_valid_tokens: int) -> None:
        # A loss that is not finite may still have finite gradients (an infinite cross-entropy, a pack of dummies or skipped_samples that
        # reaches nothing that trains): spoil them, so that every rank sees a norm that is not finite and the step is thrown away
        # everywhere, with no message between ranks.
        sound = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        handle = self._witness.register_hook(lambda gradient: gradient * sound)
        # DeepSpeed averages over ranks; the factor turns that into the sum. scale_wrt_gas would divide once more.
        self._engine.backward(
            loss * sound * (self._settings.world / global_valid_tokens), scale_wrt_gas=False
        )
        handle.remove()

    def grad_norms(self) -> GradNorms:
        return self._norms.read()

    def step(self, lr: float, *, discard: bool = False) -> bool:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            return self._step_without_zero(discard)
        with idle(self._optimizer) if discard else nullcontext():
            self._engine.step()
        return bool(self._engine.was_step_applied()) and not discard

    def _step_without_zero(self, discard: bool) -> bool:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
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
        # A rank may hold no elements at all (a tiny model on many ranks): its empty partitions step too.
        return int(self._optimizer.state[self._flats[0]]["step"].item()) if self._flats else 0

    def restored(self, optimizer_steps: int) -> None:
        for flat in self._flats:
            self._optimizer.state[flat]["step"].fill_(optimizer_steps)
        refresh_weights(self._engine)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._settings.bf16 else torch.float32

    def whole_shapes(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        found = [
            (n, tuple(getattr(p, "ds_shape", p.shape)), self.compute_dtype)
            for n, p in self._module.model.named_parameters()
        ]
        return found + [
            (name, tuple(b.shape), b.dtype) for name, b in persistent_buffers(self._module.model)
        ]

    @torch.no_grad()
    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        import deepspeed

        main = self._engine.global_rank == 0
        for name, parameter in self._module.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                whole = (
                    parameter.detach().to("cpu", copy=True)
                    if main
                    else torch.empty_like(parameter, device="meta")
                )
            yield name, whole
        for name, buffer in persistent_buffers(self._module.model):
            yield (
                name,
                buffer.detach().to("cpu", copy=True)
                if main
                else torch.empty_like(buffer, device="meta"),
            )


@contextmanager
def idle(optimizer: Any) -> Iterator[None]:
    """`optimizer.step` does nothing. DeepSpeed has no call that throws a finite gradient away; every ZeRO stage clears it, and copies
    fp32 weights, here unchanged, into those the model computes with, around the steps of the optimizer that it was handed.
    """
    optimizer.step = lambda: None  # hides the method of the class
    try:
        yield
    finally:
        del optimizer.step


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, for CPU ranks where there is no GPU, and without the operator that training never calls.

    Its shared-memory all-reduce serves inference alone (0.19.8: only `inference_all_reduce` uses it), takes 70 s to compile
    on a fresh machine, and leaves 66 MiB a rank in /dev/shm when a run is killed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    from deepspeed.utils import logger, set_log_level_from_string

    set_log_level_from_string("warning")
    # The model's own output is a dataclass; PackedLoss around it hands the engine plain tensors, which is what the warning asks for.
    logger.addFilter(lambda record: "unknown inputs or outputs type" not in record.getMessage())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
