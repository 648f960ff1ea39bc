"""Tiny configs of LLM families that differ in what their tokens see."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "gemma2": {"sliding_window": 6, "head_dim": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 6, "head_dim": 8},
    "gpt_oss": {"sliding_window": 6, "head_dim": 8, "num_local_experts": 4},
    "stablelm": {},
    "phi3": {"rope_parameters": LONGROPE},
    "qwen2": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
        "max_position_embeddings": 8,
    },
    "mixtral": {"num_local_experts": 4, "head_dim": 8},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "falcon": {"new_decoder_architecture": False},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_positions": 128},
}


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of a family that runs in milliseconds."""
    config = CONFIG_MAPPING[family]()
    known = {**SIZES, **FAMILIES.get(family, {}), **changes}
    values = {**config.to_dict()}
    names = {getattr(config, "attribute_map", {}).get(k, k): v for k, v in known.items()}
    kept = {k: v for k, v in names.items() if k in values or k in changes}
    return CONFIG_MAPPING[family](**kept)
