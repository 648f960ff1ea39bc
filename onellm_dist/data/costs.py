"""What a sample costs: floating-point operations of its forward and backward pass.

The costs balance micro-batches, so only their ratios matter. For a weight matrix, one token costs
2 operations per parameter in the forward pass, 2 more if the gradient passes through, and 2 more if
the parameter trains; attention adds 4 x width x keys per token and layer in the forward pass. The
defaults are the sizes of the paper's model (CLIP ViT-L/14, UPM of 3 experts, LLaMA-2-7B) in stage
`align`.
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
    """A stack of transformer blocks."""

    parameters: float
    """Matrix parameters that every token is multiplied with."""
    attention_width: float
    """Sum of the attention width over the layers."""

    def forward(self, tokens: int | Ints) -> NDArray[np.float64]:
        """Return the [n] operations of the forward pass for sequences of `tokens` tokens."""
        length = np.asarray(tokens, dtype=np.float64)
        return np.asarray(
            2.0 * self.parameters * length + 4.0 * self.attention_width * length * length
        )


@dataclass(frozen=True)
class CostModel:
    """The operations that a sample takes in encoder, UPM and LLM.

    The passes count the forward pass as 1, the gradient through a module as 1, and the gradient of
    its parameters as 1.
    """

    encoder: Stack = Stack(303e6, 24 * 1024)
    """The vision encoder."""
    upm: Stack = Stack(308e6, 3 * 8 * 1024)
    """The universal projection module, all experts."""
    llm: Stack = Stack(6.607e9, 32 * 4096 / 2)
    """The LLM without its embedding; causal attention reads half of the keys."""
    visual_encoder_passes: float = 1.0
    """Passes of visual modalities through the frozen encoder."""
    other_encoder_passes: float = 2.0
    """Passes of other modalities: the gradient continues to their tokenizers."""
    upm_passes: float = 3.0
    """Passes through the UPM, which trains."""
    llm_passes: float = 2.0
    """Passes through the frozen LLM: forward, and the gradient through it."""

    def media(self, modalities: Sequence[Modality]) -> float:
        """Return the operations in encoder and UPM of a sample with these modalities."""
        total = 0.0
        for modality in modalities:
            passes = self.visual_encoder_passes if modality.visual else self.other_encoder_passes
            tokens = modality.prefix_tokens + modality.tokens
            total += passes * modality.frames * float(self.encoder.forward(tokens))
            total += self.upm_passes * float(self.upm.forward(modality.upm_tokens))
        return total

    def samples(self, media: NDArray[np.float64], llm_tokens: Ints, *, answers: int = 1) -> Ints:
        """Return the [n] costs of samples, in units of 1e6 operations.

        They are integers, so that sums are the same on every machine.

        Args:
            media: [n] operations in encoder and UPM.
            llm_tokens: [n] LLM positions.
            answers: sequences that these are divided among, of about the same length.
        """
        llm = answers * self.llm.forward(llm_tokens // answers)
        return np.rint((media + self.llm_passes * llm) / 1e6).astype(np.int64)


def count_llm_tokens(text_tokens: Ints, spans: Ints) -> Ints:
    """Return the [n] LLM positions of samples: text tokens, and SPAN_TOKENS per media span."""
    return text_tokens + SPAN_TOKENS * spans
