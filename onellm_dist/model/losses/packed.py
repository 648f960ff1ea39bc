"""The loss of a pack: that of its supervised tokens, or of its pairs of answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from onellm_dist.model.sequence_lengths import to_device_tensor
from onellm_dist.packed import PackedBatch, PackedOutput


def compute_packed_loss(model: Any, batch: PackedBatch) -> PackedOutput:
    """Run a pack.

    Args:
        model: a OneLLM.
        batch: the pack.

    Raises:
        OneLLMError: the pack contradicts itself.
    """
    if model.preference is not None:
        found: PackedOutput = model.preference.compute(model, batch)
        return found
    logits, supervised, router_weights = model.compute_packed_logits(batch)
    nll = model.token_loss(logits, batch.labels.index_select(0, supervised))
    counts = batch.text_token_counts
    sample_of_token = to_device_tensor(np.repeat(np.arange(len(counts)), counts), logits.device)
    sample = sample_of_token.index_select(0, supervised)
    loss = (nll * batch.weights.to(nll.dtype).index_select(0, sample)).sum()
    return PackedOutput(
        loss=loss,
        nll=nll.detach(),
        sample_index=sample,
        router_weights={name: w.detach().float() for name, w in router_weights.items()},
    )
