"""A model without its weights, and where they come from: read or drawn by parameter and by rows, so that nobody need hold all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.initialisation import drawn, drawn_as
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.presets import (
    build_config,
    check_directory,
    preset_processor,
    smollm2_weights,
)
from onellm_dist.model.processing import OneLLMProcessor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Rows(Protocol):
    """Something that has a parameter's values."""

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) along the first dimension."""


class Weights:
    """The values of every parameter of a model, each from the source that has it."""

    def __init__(self, default: Rows, llm: Rows | None = None) -> None:
        self._default, self._llm = default, llm
        self._copies: dict[str, str] = {}

    def copy(self, copies: Mapping[str, str]) -> None:
        """Let parameters start with the values of others: name -> name of the other."""
        self._copies |= copies

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter along its first dimension, in the source's dtype."""
        name = self._copies.get(name, name)
        source = self._llm if self._llm is not None and name.startswith("llm.") else self._default
        return source.rows(name, first, end)


def open_model(
    *, path: Path | None, preset: str | None, seed: int
) -> tuple[OneLLMForConditionalGeneration, OneLLMProcessor, Weights]:
    """What `load_model` would load, with every parameter on the meta device and its weights still to be read.

    Raises:
        UsageError: not exactly one of path and preset, or no OneLLM directory at `path`.
        OneLLMError: the directory's weights do not fit its config.
    """
    if (path is None) == (preset is None):
        raise UsageError(
            "give exactly one of path and preset",
            "the model has one source.",
            "set model.path or model.preset.",
        )
    if path is not None:
        check_directory(path)
        model = empty_model(OneLLMConfig.from_pretrained(path))
        return model, OneLLMProcessor.from_pretrained(path), Weights(_directory(path, model))
    model = empty_model(build_config(str(preset)))
    llm = (
        _Memory({f"llm.{name}": tensor for name, tensor in smollm2_weights().items()})
        if preset == "smollm2-135m"
        else None
    )
    return model, preset_processor(str(preset)), Weights(Drawn(model, seed), llm)


def empty_model(config: OneLLMConfig) -> OneLLMForConditionalGeneration:
    """A model whose parameters are on the meta device and whose buffers (rotary frequencies) are real."""
    with init_empty_weights(include_buffers=False):
        model = OneLLMForConditionalGeneration(config)
    model.tie_weights()  # registering them anew undid it
    return model


class Drawn:
    """Random weights. A parameter is drawn whole to give any of its rows."""

    def __init__(self, model: OneLLMForConditionalGeneration, seed: int) -> None:
        with torch.device("meta"):
            self._model = OneLLMForConditionalGeneration(
                model.config
            )  # `model`'s parameters will be replaced
        self._seed = seed

    @torch.no_grad()
    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        return drawn(
            drawn_as(name, self._model),
            self._model.get_parameter(name).shape,
            self._model,
            self._seed,
        )[first:end]


class _Memory:
    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        return self._state[name][first:end]


class Files:
    """Safetensors, memory-mapped."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        return self._slice(name)[first:end]  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path].get_slice(name)


def _directory(path: Path, model: OneLLMForConditionalGeneration) -> Rows:
    if (
        not (path / INDEX).is_file() and not (path / SINGLE).is_file()
    ):  # saved by something older: read whole
        return _Memory(OneLLMForConditionalGeneration.from_pretrained(path).state_dict())
    files = files_of(path)
    source = Files(files)
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    known = set(model.state_dict())
    groups: dict[str, Iterable[str]] = {
        "missing_keys": own.keys() - files.keys(),
        "unexpected_keys": files.keys() - known,
        "mismatched_keys": (n for n in own.keys() & files.keys() if source.shape(n) != own[n]),
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


def files_of(path: Path) -> dict[str, Path]:
    """Name of a weight -> the file that has it."""
    try:
        if (path / INDEX).is_file():
            places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            absent = sorted({file for file in places.values() if not (path / file).is_file()})
            if absent:
                raise OneLLMError(
                    f"{path}: {', '.join(absent)} of {INDEX} are not there",
                    "weights are missing.",
                    "copy all of its files.",
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
