"""GGUF files of llama.cpp, in: dequantised one tensor at a time, in transformers' names and rotary order."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import Opened, Options, Tensors
from onellm_dist.convert.formats.hf import fitted_llm, llm_shapes
from onellm_dist.convert.tensors.lazy import LazyTensor

NAME, KIND = "gguf", "llm"
_PLAIN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "starcoder2", "stablelm")
"""Architectures whose tensors are transformers' own but for names (and llama's rotary order)."""


def recognise(path: Path) -> bool:
    """A file that begins with GGUF's magic."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_checkpoint(path: Path, options: Options) -> Opened:
    """Open the file `path`; quantised tensors become fp32 (or --dtype).

    Raises:
        UsageError: the reader is not installed, the file is broken, or its architecture is not known here.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "the package gguf is not installed", "it reads GGUF files.", "pip install gguf"
        )
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    if not recognise(path):
        raise UsageError(
            f"{path} is no GGUF file", "there is nothing to convert.", "give a .gguf file."
        )
    try:
        reader = GGUFReader(path)
        arguments = dict(load_gguf_checkpoint(path, return_tensors=False)["config"])
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UsageError(
            f"{path} cannot be read: {(str(error).splitlines() or ['cut short'])[0]}",
            "nothing was converted.",
            "download it again.",
        ) from None
    kind = arguments.pop("model_type", "")
    if kind not in _PLAIN:
        raise UsageError(
            f"{path} has architecture {kind}",
            "its tensors would need more than new names.",
            f"known: {', '.join(_PLAIN)}.",
        )
    config: Any = CONFIG_MAPPING[kind](**arguments)
    with torch.device("meta"):
        names = get_gguf_hf_weights_map(AutoModelForCausalLM.from_config(config), TensorProcessor())
    tensors: Tensors = {}
    ignored = []
    for entry in reader.tensors:
        if entry.name == "rope_freqs.weight":
            ignored.append(entry.name)
        else:
            tensors[names.get(entry.name, entry.name)] = _tensor(entry, config)
    quantised = sorted({entry.tensor_type.name for entry in reader.tensors})
    opened = Opened(
        NAME,
        KIND,
        config,
        tensors,
        (path,),
        path,
        tuple(ignored),
        notes={"stored as": ", ".join(quantised)},
    )
    return fitted_llm(opened, llm_shapes(config))


def _tensor(entry: Any, config: Any) -> LazyTensor:
    from gguf import GGMLQuantizationType, dequantize

    shape = tuple(int(n) for n in reversed(entry.shape))
    stored = {
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }.get(entry.tensor_type, torch.float32)
    reorder = _reorder(entry.name, config)

    def load() -> torch.Tensor:
        values = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).reshape(shape)
        return reorder(values).to(stored)

    return LazyTensor(shape, stored, load)


def _reorder(name: str, config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """llama.cpp keeps Meta's order of rotary channels for the llama architecture (mistral has its name), and for no other."""
    heads = {
        "attn_q.weight": config.num_attention_heads,
        "attn_k.weight": config.num_key_value_heads,
    }.get(name.split(".", 2)[-1])
    if heads is None or config.model_type not in ("llama", "mistral"):
        return lambda values: values
    return lambda values: (
        values.reshape(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
    )
