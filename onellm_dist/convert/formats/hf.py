"""Causal LMs of transformers: directories with safetensors or .bin weights, in and out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from onellm_dist.common.errors import UsageError
from onellm_dist.common.remote_code import REASON, REMEDY
from onellm_dist.convert.checkpoint import (
    ConversionOptions,
    KeyProblem,
    OpenedCheckpoint,
    OutputPlan,
    build_on_meta,
    drop_tied_copies,
    fit_tensors,
)
from onellm_dist.convert.folder_kinds import (
    identify_folder,
    read_json,
    refuse_impossible_sizes,
    refuse_quantised,
)
from onellm_dist.convert.names.from_pretrained import rename_state
from onellm_dist.convert.tensors.lazy import LazyTensor
from onellm_dist.convert.tensors.safetensors_files import read_folder
from onellm_dist.convert.tensors.writers import split_into_files, write_index
from onellm_dist.convert.tokenizers import copy_tokenizer
from onellm_dist.model.generation.settings import read_generation, write_generation

NAME = "hf"
KIND = "llm"
ORDER = 3
ABOUT = "A transformers directory of a causal LM."
EXAMPLE = "Llama-2-7b-hf"
DEFAULT_TARGET = "meta-llama"

_MASK = re.compile(r".*\.attn\.(masked_)?bias|.*\.attention\.(masked_)?bias")
"""Causal masks that older versions of transformers saved and newer ones compute."""
_FREQUENCIES = re.compile(r".*rotary_emb\.inv_freq")
"""Rotary frequencies that older versions saved; newer ones compute them from the config."""


def is_format(path: Path) -> bool:
    """Whether a path is a folder whose config.json is of a causal LM."""
    config = read_config(path)
    return config is not None and any(
        "CausalLM" in str(name) or "LMHead" in str(name) for name in _list_architectures(config)
    )


def _list_architectures(config: dict[str, Any]) -> list[Any]:
    found = config.get("architectures")
    return found if isinstance(found, list) else []


def read_config(path: Path) -> dict[str, Any] | None:
    """`config.json` of a folder; None if there is none that can be read."""
    return read_json(path / "config.json")


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open the directory `path`.

    Raises:
        UsageError: no config or weights that this transformers knows, or files are missing.
    """
    raw = read_config(path)
    if raw is None:
        kind = identify_folder(path)
        raise UsageError(
            f"no config.json in {path}" + ("" if kind is None else f": it is {kind.what}"),
            "the architecture is in it.",
            "give a directory that save_pretrained wrote." if kind is None else kind.do,
        )
    refuse_quantised(path, raw)
    refuse_impossible_sizes(path, raw)
    if (kind := identify_folder(path)) is not None:
        raise UsageError(f"{path} is {kind.what}", "a causal LM alone can be read here.", kind.do)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = get_llm_model(config)
    except Exception as error:  # whatever a config of any content makes transformers raise
        raise _make_config_error(path, raw, error) from None
    state, files = read_folder(path)
    renamed = rename_state(state, model)
    opened = OpenedCheckpoint(
        NAME, KIND, config, renamed, files, path, generation=read_generation(path)
    )
    return fit_llm(opened, model)


def get_llm_model(config: Any) -> Any:
    """The causal LM of a config, on the meta device."""
    return build_on_meta(lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def _make_config_error(path: Path, raw: dict[str, Any], error: Exception) -> UsageError:
    if "auto_map" in raw:
        return UsageError(
            f"{path}: its config.json names code of its own (auto_map), and this transformers does "
            f"not know the model type {str(raw.get('model_type'))[:80]!r}",
            REASON,
            REMEDY,
        )
    kind = identify_folder(path)
    reason = kind.what if kind else (str(error).splitlines() or [type(error).__name__])[0][:300]
    return UsageError(
        f"{path}: not a causal LM of this transformers ({reason})",
        "the names of its weights are unknown.",
        kind.do if kind else "use another LLM.",
    )


def fit_llm(opened: OpenedCheckpoint, model: Any = None) -> OpenedCheckpoint:
    """Match an LLM's tensors with its parameters; tied heads are compared.

    Args:
        opened: a checkpoint whose tensors have transformers' names.
        model: the LLM on the meta device; default: what its config builds.

    Returns:
        It with ignored keys and problems.
    """
    if model is None:
        model = get_llm_model(opened.config)
    state, copies, problems = drop_tied_copies(opened.tensors, model)
    for key in [key for key in state if _FREQUENCIES.fullmatch(key)]:
        if fault := _compare_frequencies(state[key], model, opened.config):
            problems.append(KeyProblem("mismatched", key, fault))
            state.pop(key)
    tensors, unused, more = fit_tensors(
        {key: (key, tensor) for key, tensor in state.items()},
        {name: tuple(p.shape) for name, p in model.named_parameters()},
        ignore=lambda key: bool(
            _FREQUENCIES.fullmatch(key)
            or (_MASK.fullmatch(key) and len(state[key].shape) in (0, 4))
        ),
    )
    return replace(
        opened,
        kind=KIND,
        tensors=tensors,
        ignored=(*opened.ignored, *copies, *unused),
        problems=(*opened.problems, *problems, *more),
    )


def _compare_frequencies(stored: LazyTensor, model: Any, config: Any) -> str:
    """How a checkpoint's rotary frequencies differ from those of its config; "" if they do not."""
    rotary = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
    if rotary is None:
        return ""
    own = type(rotary)(config).inv_freq.float()
    values = stored.read().float()
    if own.shape == values.shape and torch.allclose(own, values, rtol=0.01):
        return ""
    return (
        "has other rotary frequencies than config.json gives: its RoPE keys are not these weights'"
    )


def get_architecture(config: Any) -> str:
    """Name of the class that `AutoModelForCausalLM` builds for a config."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config, trust_remote_code=False)).__name__


def plan_output(opened: OpenedCheckpoint, options: ConversionOptions) -> OutputPlan:
    """A directory that `from_pretrained` and servers such as vLLM read."""
    files = split_into_files(list(opened.tensors.items()), options.shard_bytes)

    def finish(folder: Path) -> None:
        config = opened.config
        config.architectures = [get_architecture(config)]
        config.dtype = opened.dtype
        config.save_pretrained(folder)
        write_generation(folder, opened.generation, config)
        write_index(folder, files)
        copy_tokenizer(options.tokenizer or opened.root, folder)

    return OutputPlan(files, finish)
