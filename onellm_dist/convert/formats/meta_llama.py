"""Meta's LLaMA checkpoints: consolidated.NN.pth (NN: model-parallel rank) with params.json beside it, in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import Opened, Options, Plan, Tensors
from onellm_dist.convert.formats.hf import fitted_llm, llm_shapes
from onellm_dist.convert.names.llama import (
    ROTARY_TABLE,
    check_heads,
    config_from_params,
    name_from_meta,
    name_to_meta,
    params_from_config,
    rotary_heads,
    to_halves,
    to_pairs,
)
from onellm_dist.convert.tensors.lazy import same_bytes
from onellm_dist.convert.tensors.parallel_files import merged, numbered_files
from onellm_dist.convert.tensors.writers import TensorFile

NAME, KIND = "meta-llama", "llm"


def recognise(path: Path) -> bool:
    """A consolidated file, or a folder of them, with Meta's keys."""
    try:
        state = merged(numbered_files(path)[:1], width_of=None)
    except (UsageError, OSError):
        return False
    return "tok_embeddings.weight" in state and not any(key.startswith("llma.") for key in state)


def open_checkpoint(path: Path, options: Options) -> Opened:
    """Open the folder `path` (or its first file); the rotary rows of wq and wk are put into transformers' order.

    Raises:
        UsageError: files are missing, params.json contradicts the weights, or heads contradict the rotary table.
    """
    files = numbered_files(path)
    state = merged(files, width_of="layers.0.attention.wq.weight")
    for key in (
        "tok_embeddings.weight",
        "layers.0.attention.wq.weight",
        "layers.0.attention.wk.weight",
        "layers.0.feed_forward.w1.weight",
    ):
        if key not in state:
            raise UsageError(
                f"{files[0]}: no key {key}",
                "the sizes are read from it.",
                "give LLaMA's consolidated.00.pth.",
            )
    params = _params(files[0], options)
    config = config_from_params(params, {k: t.shape for k, t in state.items()}, files[0].parent)
    table = next((t for k, t in state.items() if ROTARY_TABLE.fullmatch(k)), None)
    check_heads("--llm-heads", config.num_attention_heads, config.hidden_size, table)
    if "output.weight" in state and same_bytes(
        state["output.weight"], state["tok_embeddings.weight"]
    ):
        config.tie_word_embeddings = True  # LLaMA 3.2's small models; Meta's files hold both
    named: Tensors = {}
    dropped = []
    for key, tensor in state.items():
        if ROTARY_TABLE.fullmatch(key):
            dropped.append(key)
            continue
        name = name_from_meta(key) or key
        heads = rotary_heads(name, config)
        rows_fit = (
            heads is not None and len(tensor.shape) == 2 and tensor.shape[0] % (2 * heads) == 0
        )
        named[name] = to_halves(tensor, heads) if heads and rows_fit else tensor
    notes = {"model-parallel files": len(files)} if len(files) > 1 else {}
    opened = Opened(NAME, KIND, config, named, files, files[0].parent, tuple(dropped), notes=notes)
    return fitted_llm(opened, llm_shapes(config))


def _params(file: Path, options: Options) -> dict[str, Any]:
    path = file.with_name("params.json")
    if path.is_file():
        try:
            return {
                **json.loads(path.read_text(encoding="utf-8")),
                **({"n_heads": options.llm_heads} if options.llm_heads else {}),
            }
        except (json.JSONDecodeError, TypeError) as error:
            raise UsageError(
                f"{path} cannot be read: {error}", "heads and RoPE are in it.", "download it again."
            ) from None
    if options.llm_heads is None:
        raise UsageError(
            f"no {path}",
            "heads, RoPE and the norm's epsilon are in it.",
            "copy it beside the weights, or give --llm-heads.",
        )
    return {"n_heads": options.llm_heads}


def plan(opened: Opened, options: Options) -> Plan:
    """`consolidated.00.pth`, `params.json` and `tokenizer.model` where there is one.

    Raises:
        UsageError: not a LLaMA.
    """
    config = opened.config
    params = params_from_config(config)
    tensors: Tensors = {}
    for name, tensor in opened.tensors.items():
        key, heads = name_to_meta(name), rotary_heads(name, config)
        if key is None:
            raise UsageError(
                f"Meta's LLaMA has no {name}",
                "it cannot be written.",
                "keep the model in transformers' layout.",
            )
        tensors[key] = to_pairs(tensor, heads) if heads else tensor
    if "output.weight" not in tensors:  # tied: Meta's code has a head of its own
        tensors["output.weight"] = tensors["tok_embeddings.weight"]

    def finish(folder: Path) -> None:
        (folder / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
        source = options.tokenizer or opened.root / "tokenizer.model"
        if source.name == "tokenizer.model" and source.is_file():
            shutil.copyfile(source, folder / "tokenizer.model")

    return Plan((TensorFile("consolidated.00.pth", tuple(tensors.items())),), finish)
