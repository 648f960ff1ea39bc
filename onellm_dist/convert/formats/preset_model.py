"""A preset's model as a checkpoint: drawn again from its seed."""

from __future__ import annotations

import torch

from onellm_dist.convert.checkpoint import (
    ConversionOptions,
    OpenedCheckpoint,
    add_prefix,
    cast_tensors,
)
from onellm_dist.convert.formats import gguf
from onellm_dist.convert.new_parameters import draw_tensors
from onellm_dist.model.presets import TOY_TOKENIZER, build_config, find_smollm2_gguf


def open_preset(name: str, seed: int) -> OpenedCheckpoint:
    """Open a preset.

    Args:
        name: its name.
        seed: seed of its random weights.
    """
    config = build_config(name)
    tensors = draw_tensors(config, seed)
    if name != "smollm2-135m":
        return OpenedCheckpoint("preset", "onellm", config, tensors, (), TOY_TOKENIZER)
    llm = gguf.open_checkpoint(find_smollm2_gguf(), ConversionOptions())
    llm_tensors = add_prefix(cast_tensors(llm.tensors, torch.float32), "llm.")
    return OpenedCheckpoint(
        "preset", "onellm", config, {**tensors, **llm_tensors}, llm.files, llm.root
    )
