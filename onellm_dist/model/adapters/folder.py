"""The folder of an adapter: PEFT's own files, and what the adapter was trained over.

    adapter_config.json          PEFT's configuration
    adapter_model.safetensors    the adapters, named as PEFT names them
    onellm_adapter.json          the base: `{"path": ..., "files": {name: [bytes, mtime, sha256]}}`
                                 or `{"preset": ..., "seed": ...}`, and `frozen_weights` if they
                                 were quantised
    config.json, processor       as in the folder of a whole model

Such a folder may be given wherever a model is read to be used: the base is loaded, and the adapter
is merged into it. Only a run's `model.path` takes whole models alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from onellm_dist.common.checksums import check_folder, hash_once, list_recorded_files
from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.logging import ONCE, get_logger
from onellm_dist.config.train_sections import LoraSection
from onellm_dist.model.adapters.lora import ADAPTER, MAGNITUDE, build_peft_config, import_peft
from onellm_dist.model.spans.trained import read_saved_spans, set_spans

_log = get_logger(__name__)
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "onellm_adapter.json"
PREFIX = "base_model.model."
"""What PEFT puts before the names of a wrapped model."""


@dataclass(frozen=True)
class AdapterBase:
    """What an adapter was trained over."""

    path: Path | None
    preset: str | None = None
    seed: int = 0
    files: Mapping[str, Any] | None = None
    """Name of each file of `path` to its size, time and SHA-256."""
    frozen_weights: str = "plain"
    """What the frozen weights were held in (`engine.frozen_weights`)."""


def describe_rounding(frozen_weights: object) -> str | None:
    """What a model is that was trained over quantised weights; None if it was not.

    Args:
        frozen_weights: `engine.frozen_weights` of the run.
    """
    if frozen_weights in (None, "plain"):
        return None
    return (
        f"trained over LLM weights in {frozen_weights}; this model has those from before that "
        "rounding, and its outputs differ a little from those of the run"
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no weights of a whole model."""
    return (folder / CONFIG).is_file() and not (folder / "model.safetensors").is_file()


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    section: LoraSection,
    base: Mapping[str, Any],
) -> None:
    """Write PEFT's files and the description of the base into an existing folder.

    Args:
        folder: the folder.
        tensors: the adapters, by the names of their parameters in the model.
        section: the `train.lora` section.
        base: what `train.checkpoint.source.describe_source` says.
    """
    layers = {name.split(".lora_", 1)[0] for name in tensors}
    config = build_peft_config(section, layers)
    config.base_model_name_or_path = base.get("path")
    config.inference_mode = True
    config.save_pretrained(folder)
    # PEFT reads and writes a set of layers; sorted, the file is the same every time.
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    written["target_modules"] = sorted(layers)
    (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")
    save_file(
        {get_peft_name(name): tensor.contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    (folder / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def get_peft_name(name: str, adapter: str = ADAPTER) -> str:
    """The name under which PEFT saves a parameter of an adapter.

    Args:
        name: the parameter's, in the model.
        adapter: the adapter's, in the model.
    """
    magnitude = MAGNITUDE.replace(ADAPTER, adapter)
    if name.endswith(magnitude):
        return PREFIX + name.removesuffix(magnitude) + ".lora_magnitude_vector"
    return PREFIX + name.replace(f".{adapter}.", ".")


def read_base(folder: Path, moved: Path | None = None) -> AdapterBase:
    """Read what an adapter was trained over.

    Args:
        folder: the adapter's folder.
        moved: where the base is now, if not where the folder says.

    Raises:
        UsageError: the folder does not say, or the base is not there.
    """
    source = folder / (BASE if (folder / BASE).is_file() else CONFIG)
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
        path = found.get("path" if source.name == BASE else "base_model_name_or_path")
        preset, seed, files = found.get("preset"), int(found.get("seed", 0)), found.get("files")
        rounding = str(found.get("frozen_weights", "plain"))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{source}: {error}",
            "it says which model the adapter belongs to.",
            "copy the folder of the adapter again.",
        ) from None
    if moved is not None:
        return AdapterBase(moved, preset, seed, files, rounding)
    if preset is not None:
        return AdapterBase(None, str(preset), seed, frozen_weights=rounding)
    candidates = [] if path is None else [Path(path), folder / path]
    existing = next((p for p in candidates if (p / "config.json").is_file()), None)
    if existing is None:
        raise UsageError(
            f"{folder}: the adapter was trained over {path or 'a model that it does not name'}, "
            "which is not here",
            "an adapter holds changes of a model, not the model.",
            f"copy that model to this place, or set its folder in {source}; "
            "`onellm convert adapter` also takes it as --base.",
        )
    return AdapterBase(existing, files=files, frozen_weights=rounding)


def check_base(folder: Path, base: AdapterBase) -> None:
    """Refuse to add an adapter to other weights than it was trained over.

    A folder without the digests of its base, as PEFT writes it, is warned about.

    Raises:
        UsageError: a file of the base differs, or is missing.
    """
    if base.path is None:
        return
    if not base.files:
        _log.warning(
            "%s does not record the files of its base: whether it was trained over %s is not "
            "checked",
            *(folder, base.path),
            extra=ONCE,
        )
        return
    recorded = list_recorded_files(base.path)
    for name, digest in _list_digests(folder, base.files):
        path = base.path / name
        try:
            found = recorded.get(path) or hash_once(path)
        except OSError as error:
            found = str(error)
        if found != digest:
            raise UsageError(
                f"{folder}: {path} is not the file that the adapter was trained over",
                "an adapter means nothing over other weights.",
                "restore the model that the run started from.",
            )


def _list_digests(folder: Path, files: Any) -> list[tuple[str, str]]:
    try:
        return [(name, digest) for name, (*_, digest) in files.items()]
    except (AttributeError, TypeError, ValueError):
        raise UsageError(
            f"{folder / BASE}: files does not give the SHA-256 of each file of the base",
            "they tell whether the base is the one that the adapter was trained over.",
            "copy the folder of the adapter again.",
        ) from None


def check_weights(folder: Path) -> None:
    """Refuse a folder whose weights are missing, or not those that it records.

    Raises:
        UsageError: they are missing, cannot be read, or were changed or damaged.
    """
    try:
        with (folder / WEIGHTS).open("rb"):
            check_folder(folder)
    except OSError as error:
        raise UsageError(
            f"{folder / WEIGHTS} cannot be read: {error.strerror or error}",
            "it holds the adapter.",
            "copy the folder of the adapter again.",
        ) from None


def load_adapted(
    folder: Path, load_base: Callable[[AdapterBase], tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Load the base of an adapter, and merge the adapter into it.

    Media then take as many spans as where the adapter was trained.

    Args:
        folder: the adapter's folder.
        load_base: loads a base: (model, processor).

    Returns:
        (model, processor).

    Raises:
        UsageError: the adapter's weights are missing or damaged, the base is not there or another
            one, or PEFT is not installed.
        OneLLMError: the adapter does not fit the base.
    """
    peft = import_peft()
    check_weights(folder)
    base = read_base(folder)
    check_base(folder, base)
    model, processor = load_base(base)
    with explain_faults(folder):
        wrapped = peft.PeftModel.from_pretrained(model, folder, torch_device="cpu")
    check_names(folder, wrapped)
    if word := describe_rounding(base.frozen_weights):
        _log.warning("%s: %s", folder, word, extra=ONCE)
    merged: Any = wrapped.merge_and_unload()
    merged.requires_grad_(True)
    merged.encoder.requires_grad_(False)
    spans = read_saved_spans(folder)
    if spans is not None:
        set_spans(merged.config, spans)
        processor.set_spans(spans)
    return merged, processor


@contextmanager
def explain_faults(folder: Path) -> Iterator[None]:
    """Say what is wrong with the folder of an adapter that PEFT cannot load.

    Raises:
        UsageError: its weights cannot be read.
        OneLLMError: it does not fit its base.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{folder / WEIGHTS} cannot be read: {error}",
            "it holds the adapter.",
            "copy the folder of the adapter again.",
        ) from None
    except (RuntimeError, ValueError, KeyError) as error:
        raise OneLLMError(
            f"{folder}: the adapter does not fit its base: {get_first_line(error)}",
            "parts of it would be lost.",
            "give the model that it was trained over.",
        ) from None


def check_names(folder: Path, wrapped: Any, adapter: str = ADAPTER) -> None:
    """Refuse files with other parameters than the wrapped model has: PEFT only warns.

    Args:
        folder: the adapter's folder.
        wrapped: PEFT's model.
        adapter: the adapter's name in it.

    Raises:
        OneLLMError: they differ.
    """
    own = {
        get_peft_name(name.removeprefix(PREFIX), adapter)
        for name, _ in wrapped.named_parameters()
        if ".lora_" in name and f".{adapter}." in name
    }
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        wrong = sorted(own ^ set(file.keys()))
    if wrong:
        raise OneLLMError(
            f"{folder}: {WEIGHTS} does not fit {CONFIG}: {', '.join(wrong[:3])}",
            "parts of the adapter would be random or lost.",
            "copy the folder of the adapter again.",
        )
