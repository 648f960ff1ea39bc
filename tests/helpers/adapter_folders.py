"""Folders of adapters with weights that change answers, without a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onellm_dist.config.train_sections import LoraSection
from onellm_dist.model.adapters.folder import write_adapter
from onellm_dist.model.adapters.lora import add_adapters
from onellm_dist.model.presets import load_model
from onellm_dist.model.spans.trained import set_spans

SECTION = LoraSection(rank=4, alpha=8, targets=("llm.*self_attn*", "upm.*"))


def save_base(folder: Path, spans: Mapping[str, int] | None = None) -> Path:
    """A model with random weights, as a folder."""
    model, processor = load_model(path=None, preset="toy", seed=0)
    set_spans(model.config, spans or {})
    processor.set_spans(spans or {})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int,
    section: LoraSection = SECTION,
    scale: float = 0.3,
    spans: Mapping[str, int] | None = None,
) -> Any:
    """Write an adapter of `base` with random factors; returns the model with the adapter beside.

    `spans` is `data.spans` of its training; None: as the base's.
    """
    loaded, processor = load_model(path=base, preset=None, seed=0)
    model: Any = loaded
    if spans is not None:
        set_spans(model.config, spans)
        processor.set_spans(spans)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_adapters(model, section)
    generator = torch.Generator().manual_seed(seed)
    factors = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for parameter in factors.values():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            # A magnitude stays positive, as training leaves it.
            parameter.copy_(parameter * noise.exp() if parameter.ndim == 1 else noise)
    values = {name: p.detach() for name, p in factors.items()}
    write_adapter(folder, values, section, {"path": str(base)})
    return model.eval()
