"""How much work a stage is, and how long this machine will take: printed before it starts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onellm_dist.modalities import QUERY_TOKENS, SPAN_TOKENS, get_modality

if TYPE_CHECKING:
    import torch

TEXT_TOKENS = 24
"""Tokens of a caption, about."""


def step_flops(config: Any, samples: Mapping[str, int], *, tune: bool) -> float:
    """FLOPs of one optimizer step over `samples` (modality -> samples), forward and backward.

    A matrix product of a token with P parameters is 2P forward, 2P for the input's gradient, 2P for the weights'.
    Encoder: forward, and in align the input's gradient for what goes through a tokenizer. UPM: all three in align.
    LLM: forward and input's gradient in align, all three in tune. Attention adds 4 * length * width a token and layer.

    Args:
        config: a OneLLMConfig.
        tune: the stage (align otherwise).
    """
    vision, upm, text = config.vision, config.upm, config.text_config
    encoder_block = (4 + 2 * vision.mlp_ratio) * vision.width**2
    upm_block = 4 * vision.width**2 + 3 * vision.width * upm.ffn
    head = text.hidden_size // text.num_attention_heads
    llm_block = (
        2 * text.hidden_size**2
        + 2 * text.hidden_size * text.num_key_value_heads * head
        + 3 * text.hidden_size * text.intermediate_size
    )
    total = 0.0
    for name, count in samples.items():
        modality = get_modality(name)
        sequence = modality.tokens + 1
        encoder = (
            modality.encoder_tokens
            * vision.layers
            * (2 * encoder_block + 4 * sequence * vision.width)
        )
        mixer = (
            modality.upm_tokens
            * upm.experts
            * upm.blocks
            * (2 * upm_block + 4 * modality.upm_tokens * vision.width)
        )
        llm = (SPAN_TOKENS + TEXT_TOKENS) * (
            2 * text.num_hidden_layers * llm_block + 2 * text.vocab_size * text.hidden_size
        )
        if tune:
            total += count * (encoder + mixer + 3 * llm)
        else:
            total += count * (encoder * (1 if modality.visual else 2) + 3 * mixer + 2 * llm)
        if not modality.visual and not tune:
            total += (
                count * 4 * QUERY_TOKENS * vision.width * text.hidden_size
            )  # the projections: small, for completeness
    return total


def matmul_flops(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of one thread's matrix product at the encoder's shapes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.randn(512, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        a @ b
        started, rounds = time.perf_counter(), 0
        while (spent := time.perf_counter() - started) < seconds:
            a @ b
            rounds += 1
    finally:
        torch.set_num_threads(threads)
    return 2 * 512 * 1024 * 1024 * rounds / spent
