"""Causal LMs of transformers: directories with safetensors or .bin weights, in and out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import (
    ConversionOptions,
    KeyProblem,
    OpenedCheckpoint,
    OutputPlan,
    fit_tensors,
    get_parameter_shapes,
)
from onellm_dist.convert.tensors.lazy import Shapes, Tensors, is_bitwise_equal
from onellm_dist.convert.tensors.safetensors_files import read_folder
from onellm_dist.convert.tensors.writers import split_into_files, write_index
from onellm_dist.convert.tokenizers import copy_tokenizer

NAME = "hf"
KIND = "llm"
ORDER = 3
ABOUT = "A transformers directory of a causal LM."
EXAMPLE = "Llama-2-7b-hf"
DEFAULT_TARGET = "meta-llama"

_COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")
"""Buffers that older versions of transformers saved and newer ones compute."""


def is_format(path: Path) -> bool:
    """Whether a path is a folder whose config.json is of a causal LM."""
    config = read_config(path)
    return config is not None and any(
        "CausalLM" in name or "LMHead" in name for name in config.get("architectures") or []
    )


def read_config(path: Path) -> dict[str, Any] | None:
    """`config.json` of a folder; None if there is none that can be read."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open the directory `path`.

    Raises:
        UsageError: no config or weights that this transformers knows, or files are missing.
    """
    if read_config(path) is None:
        raise UsageError(
            f"no config.json in {path}",
            "the architecture is in it.",
            "give a directory that save_pretrained wrote.",
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        wanted = get_llm_shapes(config)
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(
            f"{path}: not a causal LM of this transformers ({str(error).splitlines()[0]})",
            "the names of its weights are unknown.",
            "use another LLM.",
        ) from None
    state, files = read_folder(path)
    return fit_llm(OpenedCheckpoint(NAME, KIND, config, state, files, path), wanted)


def get_llm_shapes(config: Any) -> Shapes:
    """Shapes of a causal LM's parameters; tied ones are listed once."""
    return get_parameter_shapes(lambda: AutoModelForCausalLM.from_config(config))


def fit_llm(opened: OpenedCheckpoint, wanted: Shapes) -> OpenedCheckpoint:
    """Match an LLM's tensors with its parameters; tied heads are compared.

    Args:
        opened: a checkpoint whose tensors have transformers' names.
        wanted: shapes of the parameters.

    Returns:
        It with ignored keys and problems.
    """
    state: Tensors = dict(opened.tensors)
    ignored: list[str] = []
    problems: list[KeyProblem] = []
    head_name = "lm_head.weight"
    if opened.config.tie_word_embeddings and head_name in state and head_name not in wanted:
        head = state.pop(head_name)
        embeddings = (
            tensor
            for name, tensor in state.items()
            if name.endswith(("embed_tokens.weight", "wte.weight"))
        )
        embedding = next(embeddings, None)
        if embedding is None or is_bitwise_equal(head, embedding):
            ignored.append(head_name)
        else:
            detail = "differs from the embedding that config.json ties it to"
            problems.append(KeyProblem("unexpected", head_name, detail))
    tensors, unused, more = fit_tensors(
        {key: (key, tensor) for key, tensor in state.items()},
        wanted,
        ignore=lambda key: bool(_COMPUTED.fullmatch(key)),
    )
    return replace(
        opened,
        kind=KIND,
        tensors=tensors,
        ignored=(*opened.ignored, *ignored, *unused),
        problems=(*problems, *more),
    )


def get_architecture(config: Any) -> str:
    """Name of the class that `AutoModelForCausalLM` builds for a config."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config)).__name__


def plan_output(opened: OpenedCheckpoint, options: ConversionOptions) -> OutputPlan:
    """A directory that `from_pretrained` and servers such as vLLM read."""
    files = split_into_files(list(opened.tensors.items()), options.shard_bytes)

    def finish(folder: Path) -> None:
        config = opened.config
        config.architectures = [get_architecture(config)]
        config.dtype = opened.dtype
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        write_index(folder, files)
        copy_tokenizer(options.tokenizer or opened.root, folder)

    return OutputPlan(files, finish)
