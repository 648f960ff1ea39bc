"""The model: transformers classes over packed tokens.

Importing this package registers the classes with AutoConfig, AutoModel, AutoModelForCausalLM and
AutoProcessor: after `import onellm_dist.model`, `AutoModel.from_pretrained(DIRECTORY)` works.

Shapes in docstrings: B batch, n samples (or sequences) of a pack, T packed tokens, S positions of a
padded batch (or keys of a pack), R positions of media spans, L tokens of one encoder sequence
without its prefix, P tokens of the prefix, D encoder width, d LLM width, H heads, E experts, Q
queries (30), V vocabulary, N supervised tokens.
"""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM

from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.presets import build_config, build_meta_model, count_parameters, load_model
from onellm_dist.model.processing import OneLLMProcessor

__all__ = [
    "OneLLMConfig",
    "OneLLMForConditionalGeneration",
    "OneLLMProcessor",
    "build_config",
    "build_meta_model",
    "count_parameters",
    "load_model",
]

AutoModel.register(OneLLMConfig, OneLLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(OneLLMConfig, OneLLMForConditionalGeneration, exist_ok=True)
