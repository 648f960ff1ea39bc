"""The model: transformers classes over packed tokens. Importing this registers them with AutoConfig, AutoModel, AutoProcessor."""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM

from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.presets import build_config, load_model, meta_model, parameter_counts
from onellm_dist.model.processing import OneLLMProcessor

__all__ = [
    "OneLLMConfig",
    "OneLLMForConditionalGeneration",
    "OneLLMProcessor",
    "build_config",
    "load_model",
    "meta_model",
    "parameter_counts",
]

AutoModel.register(OneLLMConfig, OneLLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(OneLLMConfig, OneLLMForConditionalGeneration, exist_ok=True)
