"""Meta's LLaMA checkpoints: consolidated.NN.pth for each model-parallel rank; in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import ConversionOptions, OpenedCheckpoint, OutputPlan
from onellm_dist.convert.formats.hf import fit_llm
from onellm_dist.convert.names.llama import (
    ROTARY_TABLE,
    check_heads,
    from_meta_name,
    get_rotary_heads,
    to_halves,
    to_meta_name,
    to_pairs,
)
from onellm_dist.convert.names.llama_params import (
    build_llama_config,
    build_params,
    check_rotary_table,
    read_params,
)
from onellm_dist.convert.names.model_parallel import find_numbered_files, merge_files
from onellm_dist.convert.sidecar import (
    SIDECAR,
    choose_heads,
    read_sidecar,
    refuse_contradictions,
    write_sidecar,
)
from onellm_dist.convert.tensors.lazy import Tensors, is_bitwise_equal
from onellm_dist.convert.tensors.writers import TensorFile
from onellm_dist.convert.tokenizers import copy_tokenizer

NAME = "meta-llama"
KIND = "llm"
ORDER = 2
ABOUT = "Meta's consolidated.NN.pth with params.json."
EXAMPLE = "llama-2-7b"
DEFAULT_TARGET = "hf"

_SIZE_KEYS = (
    "tok_embeddings.weight",
    "layers.0.attention.wq.weight",
    "layers.0.attention.wk.weight",
    "layers.0.feed_forward.w1.weight",
)
"""Keys whose shapes are the LLM's sizes."""


def is_format(path: Path) -> bool:
    """Whether a path is a consolidated file, or a folder of them, with Meta's keys."""
    try:
        state = merge_files(find_numbered_files(path)[:1], width_of=None)
    except (UsageError, OSError):
        return False
    return "tok_embeddings.weight" in state and not any(key.startswith("llma.") for key in state)


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open a folder or its first file; rotary rows of wq and wk are put into transformers' order.

    Args:
        path: the folder or the file.
        options: heads of the LLM.

    Raises:
        UsageError: files are missing, params.json contradicts the weights, or heads contradict the
            rotary table.
    """
    files = find_numbered_files(path)
    state = merge_files(files, width_of="layers.0.attention.wq.weight")
    for key in _SIZE_KEYS:
        if key not in state or len(state[key].shape) != 2:
            raise UsageError(
                f"{files[0]}: no key {key}",
                "the sizes are read from it.",
                "give LLaMA's consolidated.00.pth.",
            )
    root = files[0].parent
    stated, generation = read_sidecar(root, "llama")
    params = _read_params(files[0], options, stated)
    config = build_llama_config(params, {k: t.shape for k, t in state.items()}, root)
    table = next((t for key, t in state.items() if ROTARY_TABLE.fullmatch(key)), None)
    check_heads("--llm-heads", config.num_attention_heads, config.hidden_size, table)
    if table is not None:
        check_rotary_table(table, float(params.get("rope_theta") or 10000.0), files[0])
    if "output.weight" in state and is_bitwise_equal(
        state["output.weight"], state["tok_embeddings.weight"]
    ):
        config.tie_word_embeddings = True  # LLaMA 3.2's small models; Meta's files hold both
    if stated is not None:
        refuse_contradictions(root, build_params(stated), build_params(config))
        config = stated
    named, ignored = _rename(state, config)
    notes = {"model-parallel files": len(files)} if len(files) > 1 else {}
    return fit_llm(
        OpenedCheckpoint(
            NAME,
            KIND,
            config,
            named,
            files,
            root,
            ignored,
            notes=notes,
            generation=generation,
        )
    )


def _rename(state: Tensors, config: Any) -> tuple[Tensors, tuple[str, ...]]:
    """(tensors under transformers' names in its rotary order, ignored keys)."""
    named: Tensors = {}
    ignored = []
    for key, tensor in state.items():
        if ROTARY_TABLE.fullmatch(key):
            ignored.append(key)
            continue
        name = from_meta_name(key) or key
        heads = get_rotary_heads(name, config)
        fits = heads and len(tensor.shape) == 2 and tensor.shape[0] % (2 * heads) == 0
        named[name] = to_halves(tensor, heads) if heads and fits else tensor
    return named, tuple(ignored)


def _read_params(file: Path, options: ConversionOptions, stated: Any) -> dict[str, Any]:
    path = file.with_name("params.json")
    params = read_params(path)
    if params is None and stated is not None:
        path, params = path.with_name(SIDECAR), build_params(stated)
    if params is None and options.llm_heads is None:
        raise UsageError(
            f"no {path}",
            "heads, RoPE and the norm's epsilon are in it.",
            "copy it beside the weights, or give --llm-heads.",
        )
    params = params or {}
    heads = choose_heads("--llm-heads", options.llm_heads, params.get("n_heads"), path)
    return {**params, "n_heads": heads}


def plan_output(opened: OpenedCheckpoint, options: ConversionOptions) -> OutputPlan:
    """`consolidated.00.pth`, `params.json`, the config beside, and the tokenizer if there is one.

    Raises:
        UsageError: not a LLaMA.
    """
    config = opened.config
    params = build_params(config)
    tensors: Tensors = {}
    for name, tensor in opened.tensors.items():
        key, heads = to_meta_name(name), get_rotary_heads(name, config)
        if key is None:
            raise UsageError(
                f"Meta's LLaMA has no {name}",
                "it cannot be written.",
                "keep the model in transformers' format.",
            )
        tensors[key] = to_pairs(tensor, heads) if heads else tensor
    if "output.weight" not in tensors:  # tied: Meta's code has a head of its own
        tensors["output.weight"] = tensors["tok_embeddings.weight"]

    def finish(folder: Path) -> None:
        (folder / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
        write_sidecar(folder, opened)
        copy_tokenizer(options.tokenizer or opened.root, folder)

    return OutputPlan((TensorFile("consolidated.00.pth", tuple(tensors.items())),), finish)
