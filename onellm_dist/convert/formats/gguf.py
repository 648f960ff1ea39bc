"""GGUF files of llama.cpp, in: dequantised one tensor at a time, in transformers' rotary order."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from onellm_dist.common.errors import UsageError
from onellm_dist.common.extras import get_install_command
from onellm_dist.convert.checkpoint import ConversionOptions, OpenedCheckpoint
from onellm_dist.convert.folder_kinds import identify_folder
from onellm_dist.convert.formats.hf import fit_llm, get_llm_model
from onellm_dist.convert.gguf_config import GGUFKeys, complete_config, get_generation
from onellm_dist.convert.tensors.file_kinds import identify_file
from onellm_dist.convert.tensors.gguf_header import is_gguf, read_gguf_header
from onellm_dist.convert.tensors.lazy import LazyTensor

NAME = "gguf"
KIND = "llm"
ORDER = 4
ABOUT = "A GGUF file of llama.cpp."
EXAMPLE = "SmolLM2-135M.gguf"
DEFAULT_TARGET = "hf"

_PLAIN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "starcoder2", "stablelm")
"""Architectures whose tensors differ from transformers' by names and rotary order alone."""
_LAYER = re.compile(r"blk\.(\d{1,9})\.")
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def is_format(path: Path) -> bool:
    """Whether a path is a file that begins with GGUF's magic."""
    return is_gguf(path)


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open a file, or all parts of a split one; quantised tensors become fp32 (or --dtype).

    Raises:
        UsageError: the reader is not installed, the file is broken, a part is missing, its
            architecture is unknown, or it states something that would be lost.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "the package gguf is not installed", "it reads GGUF files.", get_install_command("gguf")
        )
    if not is_format(path):
        kind = identify_file(path) or identify_folder(path)
        about = "is not a GGUF file" if kind is None else f"is not a GGUF file: it is {kind.what}"
        do = "give a .gguf file." if kind is None else kind.do
        raise UsageError(f"{path} {about}", "there is nothing to convert.", do)
    parts = _find_parts(path)
    keys = GGUFKeys(parts[0], read_gguf_header(parts[0]).values)
    entries = _read_tensors(parts)
    _check_layers(keys, entries)
    config = _build_config(keys, parts[0], set(entries))
    factors = entries.pop("rope_freqs.weight", None)
    if others := sorted(name for name in entries if name.startswith("rope_factors")):
        raise keys.refuse(f"its rotary positions are scaled by {', '.join(others)}")
    complete_config(keys, config, None if factors is None else _dequantise(factors))
    names = _get_names(config)
    tensors = {names.get(n, n): _open_tensor(entry, config) for n, entry in entries.items()}
    stored = sorted({entry.tensor_type.name for entry in entries.values()})
    opened = OpenedCheckpoint(
        NAME,
        KIND,
        config,
        tensors,
        parts,
        parts[0],
        notes={"stored as": ", ".join(stored)},
        generation=get_generation(keys),
    )
    return fit_llm(opened)


def _find_parts(path: Path) -> tuple[Path, ...]:
    """All files of a split model, the first one first.

    Raises:
        UsageError: some are missing, or the name does not say which part it is.
    """
    count = read_gguf_header(path).values.get("split.count", 1)
    if type(count) is not int or count < 2:
        return (path,)
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise UsageError(
            f"{path} is one of {count} parts of a split model",
            "its name does not say which, so the others are not found.",
            f"name the parts as llama.cpp does: NAME-00001-of-{count:05d}.gguf.",
        )
    parts = tuple(
        path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf")
        for number in range(1, count + 1)
    )
    if absent := [part.name for part in parts if not part.is_file()]:
        raise UsageError(
            f"{path} is one of {count} parts; missing: {', '.join(absent)}",
            "each holds tensors of the model.",
            "download them all into one folder.",
        )
    return parts


def _read_tensors(parts: Sequence[Path]) -> dict[str, Any]:
    """Name -> the reader's tensor, of all parts."""
    from gguf import GGUFReader

    entries: dict[str, Any] = {}
    for part in parts:
        read_gguf_header(part)
        try:
            found = {entry.name: entry for entry in GGUFReader(part).tensors}
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise _make_reader_error(part, error) from None
        if repeated := sorted(found.keys() & entries.keys()):
            raise _make_reader_error(part, f"{repeated[0]} is in another part too")
        entries |= found
    return entries


def _check_layers(keys: GGUFKeys, names: Iterable[str]) -> None:
    """Hold the number of layers against the tensors, before a model of so many is built."""
    stated = keys.values["block_count"]
    found = {int(match[1]) for match in map(_LAYER.match, names) if match}
    if found != set(range(len(found))) or stated != len(found):
        raise keys.refuse(f"{keys.architecture}.block_count is {stated}, {len(found)} have tensors")


def _make_reader_error(path: Path, error: object) -> UsageError:
    return UsageError(
        f"{path} cannot be read: {(str(error).splitlines() or ['cut short'])[0][:200]}",
        "nothing was converted.",
        "download it again.",
    )


def _build_config(keys: GGUFKeys, path: Path, names: set[str]) -> Any:
    """Transformers' config of a file's LLM, before `complete_config`."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        arguments = dict(load_gguf_checkpoint(path, return_tensors=False)["config"])
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise _make_reader_error(path, error) from None
    kind = arguments.pop("model_type", "")
    if kind not in _PLAIN:
        raise UsageError(
            f"{path} has architecture {str(kind)[:80]}",
            "its tensors would need more than new names.",
            f"known: {', '.join(_PLAIN)}.",
        )
    arguments["tie_word_embeddings"] = "output.weight" not in names  # of all parts, not the first
    try:
        config = CONFIG_MAPPING[kind](**arguments)
        get_llm_model(config)
    except Exception as error:  # whatever impossible sizes make transformers raise
        raise keys.refuse(
            f"no model can be built of its sizes ({(str(error).splitlines() or [''])[0][:200]})"
        ) from None
    return config


def _get_names(config: Any) -> dict[str, str]:
    """GGUF's name of each parameter -> transformers' name."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    model = get_llm_model(config)
    names: dict[str, str] = get_gguf_hf_weights_map(model, TensorProcessor())
    return names


def _dequantise(entry: Any) -> torch.Tensor:
    from gguf import dequantize

    shape = tuple(int(n) for n in reversed(entry.shape))
    return torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy()).reshape(shape)


def _open_tensor(entry: Any, config: Any) -> LazyTensor:
    from gguf import GGMLQuantizationType

    stored = {
        GGMLQuantizationType.F16: torch.float16,
        GGMLQuantizationType.BF16: torch.bfloat16,
    }.get(entry.tensor_type, torch.float32)
    reorder = _get_reordering(entry.name, config)
    shape = tuple(int(n) for n in reversed(entry.shape))
    return LazyTensor(shape, stored, lambda: reorder(_dequantise(entry)).to(stored))


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
