"""What a sample costs: floating-point operations of its forward and backward through encoder, UPM and LLM.

Used to balance micro-batches, so only ratios matter. For a weight matrix, one token costs 2 operations a parameter forward,
2 more where the gradient passes through, 2 more where the parameter is trained; attention adds 4 x width x keys a token and
layer forward. Figures: facts of the paper's sizes (CLIP ViT-L/14, UPM of 3 experts, LLaMA-2-7B), stage `align`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onellm_dist.modalities.base import SPAN_TOKENS, Modality

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Stack:
    """A stack of transformer blocks: matrix parameters that every token meets, and sum over layers of the attention width."""

    parameters: float
    attention_width: float

    def forward(self, tokens: int | Ints) -> NDArray[np.float64]:
        """[n] operations of sequences of so many tokens, forward."""
        length = np.asarray(tokens, dtype=np.float64)
        return np.asarray(
            2.0 * self.parameters * length + 4.0 * self.attention_width * length * length
        )


@dataclass(frozen=True)
class CostModel:
    """Operations of a sample; the multipliers count forward as 1, gradient through as 1 and gradient of parameters as 1."""

    encoder: Stack = Stack(303e6, 24 * 1024)
    upm: Stack = Stack(308e6, 3 * 8 * 1024)
    llm: Stack = Stack(
        6.607e9, 32 * 4096 / 2
    )  # without the embedding; causal attention reads half the keys
    visual_encoder_passes: float = 1.0
    other_encoder_passes: float = 2.0
    """The gradient passes through the frozen encoder to the tokenizer."""
    upm_passes: float = 3.0
    llm_passes: float = 2.0
    """Frozen: forward, and the gradient through."""

    def media(self, modalities: Sequence[Modality]) -> float:
        """Encoder and UPM work of a sample with these modalities."""
        total = 0.0
        for modality in modalities:
            passes = self.visual_encoder_passes if modality.visual else self.other_encoder_passes
            total += (
                passes
                * modality.frames
                * float(self.encoder.forward(modality.prefix_tokens + modality.tokens))
            )
            total += self.upm_passes * float(self.upm.forward(modality.upm_tokens))
        return total

    def samples(self, media: NDArray[np.float64], llm_tokens: Ints) -> Ints:
        """[n] cost of samples in units of 1e6 operations, whole numbers so that sums are the same on every machine."""
        return np.rint((media + self.llm_passes * self.llm.forward(llm_tokens)) / 1e6).astype(
            np.int64
        )


def llm_tokens(text_tokens: Ints, spans: Ints) -> Ints:
    """[n] LLM positions: the text's tokens and SPAN_TOKENS for each modality."""
    return text_tokens + SPAN_TOKENS * spans
