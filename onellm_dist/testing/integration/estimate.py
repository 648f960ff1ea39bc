"""The work of a stage in FLOPs, and the speed of this machine: how long a stage will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onellm_dist.modalities import QUERY_TOKENS, SPAN_TOKENS, get_modality

if TYPE_CHECKING:
    import torch

TEXT_TOKENS = 24
"""Approximate tokens of a caption."""


def compute_step_flops(config: Any, samples: Mapping[str, int], *, tune: bool) -> float:
    """FLOPs of one optimizer step, forward and backward.

    A matrix product of one token with P parameters is 2P forward, 2P for the gradient of its input
    and 2P for the gradient of the weights. Encoder: forward, and in align also the gradient of the
    input for modalities with a tokenizer of their own. UPM: all three in align, forward in tune.
    LLM: forward and the gradient of the input in align, all three in tune. Attention adds
    4 * length * width per token and layer.

    Args:
        config: a OneLLMConfig.
        samples: number of samples of each modality.
        tune: whether the stage is tune (align otherwise).
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
        encoder_layer = 2 * encoder_block + 4 * (modality.tokens + 1) * vision.width
        encoder = modality.encoder_tokens * vision.layers * encoder_layer
        upm_layer = 2 * upm_block + 4 * modality.upm_tokens * vision.width
        experts = modality.upm_tokens * upm.experts * upm.blocks * upm_layer
        llm = (SPAN_TOKENS + TEXT_TOKENS) * (
            2 * text.num_hidden_layers * llm_block + 2 * text.vocab_size * text.hidden_size
        )
        if tune:
            total += count * (encoder + experts + 3 * llm)
        else:
            total += count * (encoder * (1 if modality.visual else 2) + 3 * experts + 2 * llm)
        if not modality.visual and not tune:
            # The projections are small; they are counted for completeness.
            total += count * 4 * QUERY_TOKENS * vision.width * text.hidden_size
    return total


def measure_matmul_flops(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of one thread's matrix products at the encoder's shapes.

    Args:
        dtype: type of both matrices.
        seconds: how long to measure.
    """
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
