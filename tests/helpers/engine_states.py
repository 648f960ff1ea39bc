"""All weights of an engine at once, to compare them."""

from __future__ import annotations

import torch

from onellm_dist.train.engine.base import Engine


def gather_full_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Return all of `full_weights` at once on rank 0; {} elsewhere. Every rank must call it."""
    return {name: tensor for name, tensor in engine.full_weights() if not tensor.is_meta}
