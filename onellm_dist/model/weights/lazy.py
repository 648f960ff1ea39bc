"""A model without its weights, and sources that read or draw them by parameter and by rows.

No process has to hold all of them.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.model.adapters.folder import is_adapter
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.generation.settings import set_generation
from onellm_dist.model.initialisation import draw_parameter, get_drawn_name
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.presets import (
    build_config,
    check_directory,
    check_vocabulary,
    load_preset_processor,
    load_processor,
    load_smollm2_weights,
)
from onellm_dist.model.processing.processor import OneLLMProcessor
from onellm_dist.model.spans.positions import SPAN_ROWS, set_span_positions
from onellm_dist.model.weights.converted import ConvertedWeights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class RowSource(Protocol):
    """Something that has the values of parameters."""

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter along its first dimension."""


class InitialWeights:
    """The values with which every parameter of a model starts.

    Args:
        default: source of all parameters.
        llm: source of the LLM's parameters; default: `default`.
        zeros: parameters that start from zero because no training has seen them.
    """

    def __init__(
        self, default: RowSource, llm: RowSource | None = None, zeros: Sequence[str] = ()
    ) -> None:
        self.zeros = tuple(zeros)
        self._default = default
        self._llm = llm
        self._copies: dict[str, str] = {}

    def copy(self, copies: Mapping[str, str]) -> None:
        """Let parameters start with the values of others: name -> name of the other."""
        self._copies |= {name: self._copies.get(of, of) for name, of in copies.items()}

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter along its first dimension, in the source's dtype."""
        name = self._copies.get(name, name)
        source = self._llm if self._llm is not None and name.startswith("llm.") else self._default
        return source.rows(name, first, end)


def open_model(
    *, path: Path | None, preset: str | None, seed: int, span_positions: str | None = None
) -> tuple[OneLLMForConditionalGeneration, OneLLMProcessor, InitialWeights]:
    """Open what `load_model` would load, with every parameter on the meta device.

    Args:
        path: a model directory; or
        preset: a name of `presets.PRESETS`.
        seed: seed of a preset's random weights.
        span_positions: `none`, `fixed` or `learned`; default: as the model has them.

    Returns:
        (the model, its processor, its weights, which are still to be read).

    Raises:
        UsageError: not exactly one of path and preset, no OneLLM directory at `path`, or the model
            has other span positions.
        OneLLMError: the directory's weights do not fit its config.
    """
    model, processor = open_empty_model(path=path, preset=preset, span_positions=span_positions)
    rows = {n: p.shape for n, p in model.named_parameters() if n.endswith(SPAN_ROWS)}
    if path is not None:
        has_rows = rows and OneLLMConfig.from_pretrained(path).span_positions == "learned"
        added = {} if has_rows else rows
        source = _open_directory(path, model, added)
        source = AddedRows(source, added) if added else source
        return model, processor, InitialWeights(source, zeros=list(added))
    llm: RowSource | None = None
    if preset == "smollm2-135m":
        llm = InMemoryWeights({f"llm.{key}": t for key, t in load_smollm2_weights().items()})
    return model, processor, InitialWeights(RandomWeights(model, seed), llm, list(rows))


def open_empty_model(
    *, path: Path | None, preset: str | None, span_positions: str | None = None
) -> tuple[OneLLMForConditionalGeneration, OneLLMProcessor]:
    """Open a model with every parameter on the meta device; no file of weights is opened.

    Args:
        path: a model directory; or
        preset: a name of `presets.PRESETS`.
        span_positions: as of `open_model`.

    Raises:
        UsageError: not exactly one of path and preset, no OneLLM directory at `path`, or the model
            has other span positions.
    """
    if (path is None) == (preset is None):
        raise UsageError(
            "give exactly one of path and preset",
            "the model has one source.",
            "set model.path or model.preset.",
        )
    if path is None:
        config = build_config(str(preset))
        set_span_positions(config, span_positions)
        model = build_empty_model(config)
        return model, load_preset_processor(str(preset))
    check_directory(path)
    if is_adapter(path):
        raise UsageError(
            f"{path} holds an adapter",
            "a run starts from the weights of a whole model.",
            f"merge it first: onellm convert adapter {path} MERGED, or use the folder model/ that "
            "its run exported.",
        )
    config = OneLLMConfig.from_pretrained(path)
    set_span_positions(config, span_positions)
    model = build_empty_model(config)
    set_generation(model, path)
    processor = load_processor(path)
    check_vocabulary(path, model, processor)
    return model, processor


def build_empty_model(config: OneLLMConfig) -> OneLLMForConditionalGeneration:
    """A model with its parameters on the meta device; its buffers (rotary frequencies) are real."""
    with init_empty_weights(include_buffers=False):
        model = OneLLMForConditionalGeneration(config)
    model.tie_weights()  # accelerate registers the parameters anew, which unties them
    return model


class RandomWeights:
    """Random weights. A parameter is drawn completely to give any of its rows.

    Args:
        model: the model that is filled; its own parameters may be replaced meanwhile.
        seed: seed of all parameters.
    """

    def __init__(self, model: OneLLMForConditionalGeneration, seed: int) -> None:
        with torch.device("meta"):
            self._model = OneLLMForConditionalGeneration(model.config)
        self._seed = seed

    @torch.no_grad()
    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter, fp32."""
        shape = self._model.get_parameter(name).shape
        drawn_name = get_drawn_name(name, self._model)
        return draw_parameter(drawn_name, shape, self._model, self._seed)[first:end]


class InMemoryWeights:
    """The tensors of a state dict.

    Args:
        state: name -> tensor.
    """

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter: a view."""
        return self._state[name][first:end]


class AddedRows:
    """Weights of a model that was saved without learned span positions, which start from zero.

    Args:
        saved: the weights that were saved.
        shapes: name to shape of the parameters that were added.
    """

    def __init__(self, saved: RowSource, shapes: Mapping[str, torch.Size]) -> None:
        self._saved = saved
        self._shapes = shapes

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter."""
        if name not in self._shapes:
            return self._saved.rows(name, first, end)
        return torch.zeros(self._shapes[name])[first:end]


class SafetensorsWeights:
    """Weights in safetensors files, which are memory-mapped.

    Args:
        files: name of a weight -> the file that has it.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter, in the file's dtype."""
        values: torch.Tensor = self._slice(name)[first:end]
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path].get_slice(name)


def _open_directory(
    path: Path, model: OneLLMForConditionalGeneration, added: Container[str]
) -> RowSource:
    """The weights of a directory, which lacks the parameters `added`."""
    if not (path / INDEX).is_file() and not (path / SINGLE).is_file():
        # Weights of an older format (.bin): transformers reads all of them.
        return InMemoryWeights(OneLLMForConditionalGeneration.from_pretrained(path).state_dict())
    files = find_weight_files(path)
    source = ConvertedWeights(model, SafetensorsWeights(files), files)
    own = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in added}
    known = set(model.state_dict())
    groups: dict[str, Iterable[str]] = {
        "missing_keys": own.keys() - source.names,
        "unexpected_keys": source.names - known,
        "mismatched_keys": (n for n in own.keys() & source.names if source.shape(n) != own[n]),
    }
    problems = [
        f"{kind}: {', '.join(found)}" for kind, names in groups.items() if (found := sorted(names))
    ]
    if problems:
        raise OneLLMError(
            f"{path}: the weights do not fit the config\n" + "\n".join(problems),
            "parts of the model would be random or lost.",
            "convert the checkpoint again, or use the config it was saved with.",
        )
    return source


def find_weight_files(path: Path) -> dict[str, Path]:
    """Name of each weight of a model directory -> the safetensors file that has it.

    Raises:
        OneLLMError: a file is missing or cannot be read.
    """
    try:
        if (path / INDEX).is_file():
            places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            absent = sorted({file for file in places.values() if not (path / file).is_file()})
            if absent:
                raise OneLLMError(
                    f"{path}: files that {INDEX} names are missing: {', '.join(absent)}",
                    "they hold weights of the model.",
                    "copy all files of the directory.",
                )
            return {name: path / file for name, file in places.items()}
        with safe_open(path / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), path / SINGLE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise OneLLMError(
            f"{path}: its weights cannot be read ({error})",
            "no model can be built.",
            "copy or convert it again.",
        ) from None
