"""The learning rate of a step: linear warm-up, then cosine down to `min_lr`, or constant (paper, appendix C.1)."""

from __future__ import annotations

import math

from onellm_dist.config.schema import OptimSection


def learning_rate(step: int, optim: OptimSection, total_steps: int) -> float:
    """Rate of optimizer step `step` (the first is 0). The first step of a warm-up of w has 1/w of the rate, not zero."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    end = optim.decay_steps or total_steps
    done = min(1.0, (step - optim.warmup_steps) / max(1, end - optim.warmup_steps))
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
