"""Small OneLLMs with mixture-of-experts LLMs that read the IMU, saved by `save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from onellm_dist.model import OneLLMConfig, OneLLMForConditionalGeneration, OneLLMProcessor
from onellm_dist.model.configuration import OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.presets import load_toy_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "head_dim": 8},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "granitemoe": {"num_local_experts": 4},
}
"""Families whose checkpoints transformers converts; the experts of the last are renamed alone."""


def save_moe_model(family: str, folder: Path) -> OneLLMForConditionalGeneration:
    """Save a OneLLM of a family with its processor, and return it.

    Args:
        family: one of FAMILIES.
        folder: where to.
    """
    config = OneLLMConfig(
        vision=OneLLMVisionConfig(width=32, layers=1, heads=2, output_dim=16),
        upm=OneLLMUPMConfig(experts=1, blocks=1, heads=2, ffn=32, router_hidden=16),
        text_config=CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family]}),
        modalities=["imu"],
    )
    model = OneLLMForConditionalGeneration(config)
    initialise(model, 0, skip=("llm.",))
    model.save_pretrained(folder)
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(folder)
    return model
