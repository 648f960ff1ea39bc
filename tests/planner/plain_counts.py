"""A toy model of four modalities, its recipe, and another way to count what forward keeps."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.presets import build_config
from onellm_dist.packed import PackedBatch

MODALITIES = ("image", "video", "audio", "imu")


def make_config() -> OneLLMConfig:
    """The toy preset with four modalities."""
    toy = build_config("toy")
    return OneLLMConfig(
        vision=toy.vision, upm=toy.upm, text_config=toy.text_config, modalities=MODALITIES
    )


def write_recipe(folder: Path) -> Path:
    """A recipe whose model has a config alone, and whose data are not there."""
    make_config().save_pretrained(folder / "model")
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(folder / "model")},
                "data": {
                    "root": str(folder),
                    "mixture": [{"path": "laion400m"}, {"path": "wavcaps"}],
                    "global_batch": 64,
                    "pack_llm_tokens": 1024,
                    "pack_encoder_tokens": 16384,
                },
                "train": {"stage": "align", "steps": 100},
                "optim": {"lr": 1e-4},
            }
        )
    )
    return path


@dataclass(eq=False)
class SavedTensor:
    """What autograd holds in place of a saved tensor."""

    tensor: torch.Tensor


def count_saved(model: Any, batch: PackedBatch) -> int:
    """Bytes of the storages that autograd has saved when forward ends.

    Parameters, buffers and the micro-batch itself do not count.
    """
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    own |= {x.untyped_storage()._cdata for x in (*batch.values.values(), batch.input_ids)}
    held: weakref.WeakSet[SavedTensor] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> SavedTensor:
        saved = SavedTensor(tensor)
        held.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = model(packed=batch).loss
    gc.collect()
    storages = {x.tensor.untyped_storage()._cdata: x.tensor.untyped_storage() for x in held}
    assert loss.requires_grad
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)
