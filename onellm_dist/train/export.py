"""The end of a run: the whole model as a `save_pretrained` directory, which the next stage's `model.path` names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from onellm_dist.train.checkpoint import sync
from onellm_dist.train.distributed import World
from onellm_dist.train.engine.base import Engine

MODEL = "model"


def export_model(folder: Path, engine: Engine, model: Any, processor: Any, world: World) -> None:
    """Write the trained model and its processor to `folder`, whole or not at all. Called by all ranks; rank 0 writes.

    Args:
        model: the transformers model whose weights the engine holds; only its class and config are used.
    """
    state = engine.gather_full_state()
    if world.main:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with torch.device("meta"):
            whole = type(model)(model.config)
        whole.load_state_dict(state, strict=False, assign=True)
        whole.tie_weights()
        lacking = [name for name, p in whole.named_parameters() if p.is_meta]
        if lacking:
            raise RuntimeError(f"the engine gave no weights for {lacking[:3]}")
        whole.save_pretrained(partial)
        processor.save_pretrained(partial)
        for path in partial.iterdir():
            sync(path)
        _replace(partial, folder)
    world.barrier()


def _replace(partial: Path, folder: Path) -> None:
    """Give `partial` the name `folder`, which another export may have."""
    before = folder.with_name(f".{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)
