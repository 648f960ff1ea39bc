"""The signature that every attention kernel has."""

from __future__ import annotations

from typing import Protocol

import torch

from onellm_dist.model.sequence_lengths import SequenceLengths


class VarlenKernel(Protocol):
    """Attention within each sequence of a pack."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seq_lengths: SequenceLengths,
        *,
        causal: bool,
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """[T, H, D/H], [S, Hkv, D/H], [S, Hkv, D/H] -> [T, H, D/H].

        Args:
            q: queries of all sequences, end to end.
            k: keys; Hkv divides H (grouped-query attention).
            v: values.
            seq_lengths: where each sequence begins and ends.
            causal: query i of a sequence sees keys 0 to i.
            scale: factor on the scores; None: 1 / sqrt(D/H).
            window: with `causal`, a query sees itself and the `window - 1` keys before it.
            softcap: scores become softcap * tanh(score / softcap).
        """
