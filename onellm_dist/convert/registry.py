"""The formats there are: name -> the module that reads (and maybe writes) it. Importing this loads none of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError

MODULES = {
    "onellm": "onellm",
    "reference": "reference",
    "meta-llama": "meta_llama",
    "hf": "hf",
    "gguf": "gguf",
    "open-clip": "open_clip",
    "hf-clip": "hf_clip",
    "run": "training_run",
    "deepspeed": "zero",
    "fsdp": "dcp",
}
DEFAULT_TARGET = {
    "onellm": "reference",
    "reference": "onellm",
    "meta-llama": "hf",
    "hf": "meta-llama",
    "gguf": "hf",
    "open-clip": "hf-clip",
    "hf-clip": "open-clip",
    "run": "onellm",
    "deepspeed": "onellm",
    "fsdp": "onellm",
}
WRITABLE = ("onellm", "reference", "meta-llama", "hf", "open-clip", "hf-clip")
ABOUT = {
    "onellm": "A onellm directory.",
    "reference": "OneLLM's own consolidated.00-of-01.pth (or all of its model-parallel files), keys llma.*.",
    "meta-llama": "Meta's consolidated.NN.pth with params.json.",
    "hf": "A transformers directory of a causal LM.",
    "gguf": "A GGUF file of llama.cpp.",
    "open-clip": "A CLIP of open_clip: a folder with open_clip_config.json, or a weights file (OpenAI's .pt too).",
    "hf-clip": "A CLIP of transformers.",
    "run": "A checkpoint of one of our runs (either engine, any number of ranks), or the run directory.",
    "deepspeed": "DeepSpeed's own ZeRO checkpoint (or one of our runs').",
    "fsdp": "A torch.distributed.checkpoint directory (or one of our runs').",
}
EXAMPLES = {
    "onellm": "runs/tune/model",
    "reference": "consolidated.00-of-01.pth",
    "meta-llama": "llama-2-7b",
    "hf": "Llama-2-7b-hf",
    "gguf": "SmolLM2-135M.gguf",
    "open-clip": "ViT-L-14.pt",
    "hf-clip": "clip-vit-large-patch14",
    "run": "runs/stage1_image",
    "deepspeed": "run/global_step1000",
    "fsdp": "run/checkpoint",
}
"""A source for `--help`."""


def format_of(name: str) -> Any:
    """The module of a format: NAME, KIND, recognise, open_checkpoint and, where it is written, plan.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in MODULES:
        raise UsageError(
            f"unknown format {name!r}", "nothing can read it.", f"known: {', '.join(MODULES)}."
        )
    return importlib.import_module(f"onellm_dist.convert.formats.{MODULES[name]}")


def recognised(path: Path) -> str:
    """The name of the format that `path` has.

    Raises:
        UsageError: nothing is there, or no format fits.
    """
    if not path.exists():
        raise UsageError(f"no checkpoint {path}", "there is nothing to read.", "check the path.")
    for name in MODULES:
        if format_of(name).recognise(path):
            return name
    raise UsageError(
        f"{path} has none of the known formats",
        "nothing can read it.",
        f"known: {', '.join(MODULES)}.",
    )
