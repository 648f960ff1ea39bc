"""The trained model as a `save_pretrained` directory, which the next stage's `model.path` names.

Weights arrive from the engine one by one and go to the disk one by one: rank 0 holds the largest of
them, never all.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError

from onellm_dist.common.checksums import write_sums
from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import replace_folder, sync
from onellm_dist.model.adapters.lora import Adapter, fold_adapters, list_adapters, merge_parts
from onellm_dist.model.card import CARD, build_card
from onellm_dist.model.generation.settings import write_generation
from onellm_dist.model.losses.preference import PREFIX
from onellm_dist.model.quantised.linear import add_base, list_quantised
from onellm_dist.model.spans.trained import get_spans
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.export.adapter import AdapterTarget

FILE_BYTES = 5_000_000_000
"""Largest weights file, as transformers' own default was; a larger tensor gets a file of its
own."""
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
DISK_ERRORS = OSError, SafetensorError
"""safetensors has an error of its own for a full disk."""
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name to (shape, dtype) of every tensor."""


class ExportError(OneLLMError):
    """The disk does not take the model; a run can continue without this export."""


def export_model(
    folder: Path,
    engine: Engine,
    model: Any,
    processor: Any,
    dist: Distributed,
    notes: Mapping[str, object] = MappingProxyType({}),
    extra_files: Mapping[str, str] = MappingProxyType({}),
    adapter: AdapterTarget | None = None,
) -> None:
    """Write the trained model, its processor, a model card and checksums, or nothing at all.

    All ranks call it together; rank 0 writes.

    Args:
        folder: the directory, which may exist.
        engine: holds the weights.
        model: the transformers model; its class, config, generation settings and adapters, which
            are merged into the weights, are used.
        processor: saved beside the weights.
        dist: the ranks.
        notes: what the model card says about the training.
        extra_files: name to text of small files that belong to the model (rank 0's count).
        adapter: where the adapters are written too.

    Raises:
        ExportError: rank 0 could not write; every rank raises.
        OneLLMError: rank 0 failed otherwise; it raises the error itself.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    failure: Exception | None = None
    adapters = list_adapters(model)
    found: dict[str, torch.Tensor] = {}
    full = gather_weights(engine, model, is_rank_zero=dist.is_rank_zero)
    broken: list[Exception] = []
    weights = _watch(_merge(full, adapters, None if adapter is None else found), broken)
    if dist.is_rank_zero:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            shapes = _get_shapes(engine, model, adapters)
            parts = model, processor, engine.compute_dtype, shapes, notes
            _write_configs(partial, *parts)
            digests = write_weights(partial, weights, shapes)
            for name, text in extra_files.items():
                (partial / name).write_text(text, encoding="utf-8")
            finish_folder(partial, folder, digests)
            if adapter is not None:
                adapter.write(found, lambda into: _write_configs(into, *parts))
        except Exception as error:
            if broken:  # gathering itself has failed: it cannot be run to its end
                raise
            failure = error
    # The other ranks, and rank 0 after a failure, run the collectives to their end.
    for _ in weights:
        pass
    dist.ask_rank_zero(lambda: _raise_failure(folder, failure))


def _watch(
    weights: Iterator[tuple[str, torch.Tensor]], broken: list[Exception]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights; an error of getting them is noted."""
    try:
        yield from weights
    except Exception as error:
        broken.append(error)
        raise


def _raise_failure(folder: Path, failure: Exception | None) -> None:
    if isinstance(failure, DISK_ERRORS):
        raise ExportError(
            f"the model could not be written to {folder}: {get_first_line(failure)}",
            "the run has no exported model.",
            "free disk space, and start the run again.",
        ) from failure
    if failure is not None:
        raise failure


def finish_folder(partial: Path, folder: Path, digests: Mapping[str, str]) -> None:
    """Record the checksums of a folder, force it to the disk, and give it its name."""
    write_sums(partial, digests)
    for path in partial.iterdir():
        sync(path)
    replace_folder(partial, folder)


def write_weights(
    folder: Path,
    weights: Iterator[tuple[str, torch.Tensor]],
    shapes: Shapes,
    file_bytes: int = FILE_BYTES,
) -> dict[str, str]:
    """Write `model.safetensors`, or several files with an index, as transformers names them.

    Args:
        folder: the directory.
        weights: each of `shapes`, in the same order; held one at a time.
        shapes: what will come.
        file_bytes: largest file.

    Returns:
        Name of each file -> its SHA-256.
    """
    files = _split_files(shapes, file_bytes)
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        digest = hashlib.sha256()
        with (folder / file).open("wb") as out:
            header = _build_header({name: shapes[name] for name in names})
            out.write(header)
            digest.update(header)
            for wanted in names:
                name, tensor = next(weights)
                if name != wanted or tuple(tensor.shape) != shapes[name][0]:
                    raise RuntimeError(
                        f"the engine yielded {name} {list(tensor.shape)}, expected {wanted}"
                    )
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                out.write(data)
                digest.update(data)
        digests[file] = digest.hexdigest()
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(_count_bytes(*shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    return digests


def _merge(
    weights: Iterator[tuple[str, torch.Tensor]],
    adapters: Mapping[str, Adapter],
    found: dict[str, torch.Tensor] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the full weights with adapters merged; `found` receives the adapters on rank 0."""

    def keep() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if found is not None and ".lora_" in name and not tensor.is_meta:
                found[name] = tensor
            yield name, tensor

    for name, parts, adapter in fold_adapters(keep(), adapters):
        yield name, merge_parts(parts, adapter)


def gather_weights(
    engine: Engine, model: Any, *, is_rank_zero: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The engine's full weights, with those that are quantised as they were before.

    Copies of a reference (`model/losses/preference.py`) are left out.

    All ranks run the iterator to its end together; see `Engine.full_weights`.
    """
    layers = list_quantised(model)

    def read(name: str) -> torch.Tensor:
        layer = layers[name]
        if is_rank_zero:
            return layer.read_base().to(engine.compute_dtype)
        size = layer.out_features, layer.in_features
        return torch.empty(size, dtype=engine.compute_dtype, device="meta")

    own = engine.full_weights(lambda name: not name.startswith(PREFIX))
    return add_base(own, layers, read)


def _get_shapes(engine: Engine, model: Any, adapters: Mapping[str, Adapter]) -> Shapes:
    layers = list_quantised(model)

    def get(name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return (layers[name].out_features, layers[name].in_features), engine.compute_dtype

    held = (
        (name, (tuple(shape), dtype))
        for name, shape, dtype in engine.full_weight_shapes()
        if not name.startswith(PREFIX)
    )
    shapes = add_base(held, layers, get)
    return {name: parts[0] for name, parts, _ in fold_adapters(shapes, adapters)}


def _count_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _split_files(shapes: Shapes, file_bytes: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        if files[-1] and used + _count_bytes(*shape) > file_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += _count_bytes(*shape)
    return files


def _build_header(shapes: Shapes) -> bytes:
    """The start of a safetensors file: length, and JSON that is padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        end = offset + _count_bytes(shape, dtype)
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_configs(
    folder: Path,
    model: Any,
    processor: Any,
    dtype: torch.dtype,
    shapes: Shapes,
    notes: Mapping[str, object],
) -> None:
    """Write what `save_pretrained` adds to the weights (configs, processor), and a model card."""
    counts: Counter[str] = Counter()
    for name, (shape, _) in shapes.items():
        counts[name.split(".", 1)[0]] += math.prod(shape)
    card = build_card(model.config, counts, dtype, "from a training run", notes)
    (folder / CARD).write_text(card, encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    write_generation(folder, model.generation_settings, model.config.text_config)
    processor.set_spans(get_spans(model.config))
    processor.save_pretrained(folder)
