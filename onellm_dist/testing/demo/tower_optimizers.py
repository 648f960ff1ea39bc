"""The optimizers of the toy encoders, and their learning rates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from onellm_dist.model.encoder import Encoder
from onellm_dist.testing.demo.toy_llm import compute_cosine_rate


def set_rates(
    optimizers: Sequence[torch.optim.Optimizer], step: int, steps: int, warmup: int
) -> None:
    """Set the learning rates of a step: a warm-up, then a cosine from each group's peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * compute_cosine_rate(step, steps, warmup)


def make_optimizers(
    encoder: Encoder, head: nn.Module, lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the encoder's matrices, AdamW for everything else.

    Args:
        encoder: the encoder.
        head: what is trained with it.
        lr: peak rate of AdamW.
        muon_lr: peak rate of Muon.
    """
    matrices = [
        p for name, p in encoder.named_parameters() if name.startswith("blocks.") and p.ndim == 2
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in [*encoder.parameters(), *head.parameters()] if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.05),
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
