"""A saved model as evaluations load it, and what distinguishes it from others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.files import sha256_file
from onellm_dist.model.adapters.folder import is_adapter, read_base

_HEADER_BYTES = 1 << 20


def identify_model(folder: Path, base: Path | None = None) -> str:
    """What distinguishes a saved model from another one, without reading all of it.

    It covers the config, the tokenizer's files, its chat template and, of each file of weights,
    size, first and last MiB. Of an adapter it covers the base too.

    Args:
        folder: the model's folder.
        base: the model that an adapter is added to, if not the one that it names.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}\n".encode())
            digest.update(file.read(_HEADER_BYTES))
            file.seek(max(0, size - _HEADER_BYTES))
            digest.update(file.read())
    if base is None and is_adapter(folder):
        base = read_base(folder).path
    if base is not None:
        digest.update(identify_model(base).encode())
    return digest.hexdigest()[:16]


def load_for_evaluation(folder: Path, local_rank: int) -> tuple[Any, Any]:
    """Load a saved model and its tokenizer: in bf16 on a GPU of this machine, else in fp32.

    Args:
        folder: the model's folder.
        local_rank: which GPU.

    Raises:
        UsageError: there is no model.
    """
    from onellm_dist.model.presets import load_model

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if has_gpu else "cpu"
    model, processor = load_model(path=folder, preset=None, seed=0, dtype=choose_dtype())
    loaded: Any = model
    return loaded.to(device).eval(), processor.tokenizer


def choose_dtype() -> torch.dtype:
    """The dtype that models are evaluated in on this machine."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
