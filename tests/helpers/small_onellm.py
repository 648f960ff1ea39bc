"""A OneLLM of 120,000 weights in a folder: for what happens around a model, not for its numbers.

The toy preset has 120 times as many, which every start draws and every export writes. Token counts
are those of the preset.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.presets import load_preset_processor, load_toy_tokenizer

MODALITIES = ("image", "imu")
IDLE = ("depth",)
"""Of the model of `get_small_model` too, for what must not move in a run without them."""


@cache
def get_small_model() -> Path:
    """The folder that all tests of this process share; it ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix="small-onellm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_small_model(folder)
    return folder


def get_small_keys() -> dict[str, Any]:
    """Keys of a run of this model."""
    return {"model__path": get_small_model(), "model__preset": ""}


def build_small_config(modalities: Sequence[str] = MODALITIES) -> OneLLMConfig:
    """One block of each part, with two experts."""
    text = LlamaConfig(
        vocab_size=len(load_toy_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return OneLLMConfig(
        vision=OneLLMVisionConfig(width=32, layers=1, heads=2, output_dim=16),
        upm=OneLLMUPMConfig(experts=2, blocks=1, heads=2, ffn=32, router_hidden=32),
        text_config=text,
        modalities=modalities,
    )


def save_small_model(folder: Path) -> None:
    """Write a model with random weights and the toy world's tokenizer to a folder."""
    model: Any = OneLLMForConditionalGeneration(build_small_config([*MODALITIES, *IDLE]))
    initialise(model, 0)
    model.save_pretrained(folder)
    load_preset_processor("toy").save_pretrained(folder)
