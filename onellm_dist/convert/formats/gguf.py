"""GGUF files of llama.cpp, in: dequantised one tensor at a time, in transformers' rotary order."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import ConversionOptions, OpenedCheckpoint
from onellm_dist.convert.formats.hf import fit_llm
from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors

NAME = "gguf"
KIND = "llm"
ORDER = 4
ABOUT = "A GGUF file of llama.cpp."
EXAMPLE = "SmolLM2-135M.gguf"
DEFAULT_TARGET = "hf"

_PLAIN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "starcoder2", "stablelm")
"""Architectures whose tensors differ from transformers' by names and rotary order alone."""


def is_format(path: Path) -> bool:
    """Whether a path is a file that begins with GGUF's magic."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open the file `path`; quantised tensors become fp32 (or --dtype).

    Raises:
        UsageError: the reader is not installed, the file is broken, or its architecture is unknown.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "the package gguf is not installed", "it reads GGUF files.", "pip install gguf"
        )
    if not is_format(path):
        raise UsageError(
            f"{path} is not a GGUF file", "there is nothing to convert.", "give a .gguf file."
        )
    reader, config = _read_header(path)
    names = _get_names(config)
    tensors: Tensors = {}
    ignored = []
    for entry in reader.tensors:
        if entry.name == "rope_freqs.weight":
            ignored.append(entry.name)
        else:
            tensors[names.get(entry.name, entry.name)] = _open_tensor(entry, config)
    stored = sorted({entry.tensor_type.name for entry in reader.tensors})
    opened = OpenedCheckpoint(
        NAME,
        KIND,
        config,
        tensors,
        (path,),
        path,
        tuple(ignored),
        notes={"stored as": ", ".join(stored)},
    )
    return fit_llm(opened)


def _read_header(path: Path) -> tuple[Any, Any]:
    """(the reader of a file, transformers' config of its LLM)."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

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
    return reader, CONFIG_MAPPING[kind](**arguments)


def _get_names(config: Any) -> dict[str, str]:
    """GGUF's name of each parameter -> transformers' name."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names: dict[str, str] = get_gguf_hf_weights_map(model, TensorProcessor())
    return names


def _open_tensor(entry: Any, config: Any) -> LazyTensor:
    from gguf import GGMLQuantizationType, dequantize

    shape = tuple(int(n) for n in reversed(entry.shape))
    stored = {
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }.get(entry.tensor_type, torch.float32)
    reorder = _get_reordering(entry.name, config)

    def load() -> torch.Tensor:
        values = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).reshape(shape)
        return reorder(values).to(stored)

    return LazyTensor(shape, stored, load)


def _get_reordering(name: str, config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that puts the rows of a weight into transformers' order.

    llama.cpp keeps Meta's order of rotary channels for the llama architecture alone; mistral has
    its name.
    """
    heads = {
        "attn_q.weight": config.num_attention_heads,
        "attn_k.weight": config.num_key_value_heads,
    }.get(name.split(".", 2)[-1])
    if heads is None or config.model_type not in ("llama", "mistral"):
        return lambda values: values
    return lambda values: (
        values.reshape(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
    )
