"""Causal LMs of transformers: a directory with config.json and safetensors or .bin weights, in one file or many."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import (
    Opened,
    Options,
    Plan,
    Problem,
    Shapes,
    Tensors,
    fitted,
    parameter_shapes,
)
from onellm_dist.convert.tensors.lazy import same_bytes
from onellm_dist.convert.tensors.safetensors_files import read_folder
from onellm_dist.convert.tensors.writers import safetensor_shards, write_index
from onellm_dist.convert.tokenizers import copy_tokenizer

NAME, KIND = "hf", "llm"
_COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")
"""Buffers that older versions of transformers saved and newer ones compute."""


def recognise(path: Path) -> bool:
    """A folder whose config.json is of a causal LM."""
    config = read_config(path)
    return config is not None and any(
        "CausalLM" in name or "LMHead" in name for name in config.get("architectures") or []
    )


def read_config(path: Path) -> dict[str, Any] | None:
    """`config.json` of a folder, or None."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) else None


def open_checkpoint(path: Path, options: Options) -> Opened:
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
        wanted = llm_shapes(config)
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(
            f"{path}: no causal LM of this transformers ({str(error).splitlines()[0]})",
            "its names are unknown.",
            "use another.",
        ) from None
    state, files = read_folder(path)
    return fitted_llm(Opened(NAME, KIND, config, state, files, path), wanted)


def llm_shapes(config: Any) -> Shapes:
    """The parameters of a causal LM; tied ones stand once."""
    return parameter_shapes(lambda: AutoModelForCausalLM.from_config(config))


def fitted_llm(opened: Opened, wanted: Shapes) -> Opened:
    """`opened`, whose tensors are an LLM's in transformers' names, held against the shapes wanted; tied heads are compared.

    Returns:
        It with ignored keys and problems.
    """
    state: Tensors = dict(opened.tensors)
    ignored: list[str] = []
    problems: list[Problem] = []
    if (
        opened.config.tie_word_embeddings
        and "lm_head.weight" in state
        and "lm_head.weight" not in wanted
    ):
        head = state.pop("lm_head.weight")
        embedding = next(
            (
                t
                for name, t in state.items()
                if name.endswith(("embed_tokens.weight", "wte.weight"))
            ),
            None,
        )
        if embedding is None or same_bytes(head, embedding):
            ignored.append("lm_head.weight")
        else:
            problems.append(
                Problem(
                    "unexpected",
                    "lm_head.weight",
                    "differs from the embedding that config.json ties it to",
                )
            )
    tensors, unused, more = fitted(
        {k: (k, t) for k, t in state.items()},
        wanted,
        ignore=lambda key: bool(_COMPUTED.fullmatch(key)),
    )
    return Opened(
        opened.format,
        KIND,
        opened.config,
        tensors,
        opened.files,
        opened.root,
        (*opened.ignored, *ignored, *unused),
        (*problems, *more),
        opened.notes,
    )


def architecture_of(config: Any) -> str:
    """The class that `AutoModelForCausalLM` takes for a config."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config)).__name__


def plan(opened: Opened, options: Options) -> Plan:
    """A directory that `from_pretrained` and vLLM-like servers read."""
    files = safetensor_shards(list(opened.tensors.items()), options.shard_bytes)

    def finish(folder: Path) -> None:
        config = opened.config
        config.architectures = [architecture_of(config)]
        config.dtype = opened.dtype
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        write_index(folder, files)
        copy_tokenizer(options.tokenizer or opened.root, folder)

    return Plan(files, finish)
