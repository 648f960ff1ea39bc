"""The model: transformers classes over packed tokens.

Importing this package registers the classes with transformers' Auto classes: AutoConfig, AutoModel,
AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM (any-to-any) and
AutoProcessor. After `import onellm_dist.model`, `AutoModel.from_pretrained(DIRECTORY)` works;
without the package, a saved folder brings its code (`trust_remote_code=True`, `folder_code/`).

Shapes in docstrings: B batch, n samples (or sequences) of a pack, T packed tokens, S positions of a
padded batch (or keys of a pack), R positions of media spans, L tokens of one encoder sequence
without its prefix, P tokens of the prefix, D encoder width, d LLM width, H heads, E experts, Q
queries (30), V vocabulary, N supervised tokens.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.presets import build_config, build_meta_model, count_parameters, load_model
from onellm_dist.model.processing.processor import OneLLMProcessor

__all__ = [
    "OneLLMConfig",
    "OneLLMForConditionalGeneration",
    "OneLLMProcessor",
    "build_config",
    "build_meta_model",
    "count_parameters",
    "load_model",
]

for _config in (OneLLMConfig, OneLLMVisionConfig, OneLLMUPMConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _auto in (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
):
    _auto.register(OneLLMConfig, OneLLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(OneLLMConfig, OneLLMProcessor, exist_ok=True)
