"""Weights that transformers renames, merges or splits as it loads them, read by parameter and rows.

transformers (5.17 to 5.23) fuses the experts of MoE LLMs into one parameter a layer, and saves
them one by one again. The same conversions are applied here, by transformers' own code, to the
weights of one parameter at a time; where a parameter stacks experts, to those asked for alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from onellm_dist.common.errors import OneLLMError


class StoredWeights(Protocol):
    """Weights under the names that a file gives them."""

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a weight along its first dimension."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""


@dataclass
class _Conversion:
    """How some stored weights become some parameters.

    Attributes:
        name: the first parameter, in the form of transformers' converters.
        converter: the conversion; None: the one weight is renamed.
        keys: pattern of the converter -> names of the stored weights that it takes, in order.
        stacks: whether row i of the parameter is made of the i-th weight of each pattern alone.
    """

    name: str
    converter: WeightConverter | None
    keys: dict[str, list[str]]
    stacks: bool = False


class ConvertedWeights:
    """Stored weights as the parameters of a model.

    Args:
        model: the model; its parameters may be on the meta device.
        source: the stored weights.
        names: their names.

    Raises:
        OneLLMError: transformers' conversion cannot be applied to one parameter at a time.
    """

    def __init__(self, model: Any, source: StoredWeights, names: Iterable[str]) -> None:
        self._source = source
        # Conversions that take sizes from the model read them here; its parameters may be sharded.
        self._shapes = _Shapes(model)
        self._config = model.config
        self._of: dict[str, tuple[_Conversion, tuple[int, ...]]] = {}
        for conversion in _plan(model, names):
            for name, shape in self._find_targets(conversion).items():
                self._of[name] = conversion, shape

    @property
    def names(self) -> set[str]:
        """Names of the parameters (and of weights that the model does not have)."""
        return set(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._of[name][1]

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter along its first dimension, in the file's dtype."""
        conversion, shape = self._of[name]
        if conversion.converter is None:
            ((key,),) = conversion.keys.values()
            return self._source.rows(key, first, end)
        if not conversion.stacks:
            whole = self._convert(conversion, self._read(conversion.keys))[name]
            return whole[first:end]
        if first >= end:
            key = next(key for group in conversion.keys.values() for key in group)
            return self._source.rows(key, 0, 0).new_empty((0, *shape[1:]))
        chosen = {pattern: keys[first:end] for pattern, keys in conversion.keys.items()}
        return self._convert(conversion, self._read(chosen))[name]

    def _read(self, keys: Mapping[str, list[str]]) -> dict[str, list[torch.Tensor]]:
        return {
            pattern: [self._source.rows(key, 0, self._source.shape(key)[0]) for key in group]
            for pattern, group in keys.items()
        }

    def _find_targets(self, conversion: _Conversion) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters that a conversion makes, without reading weights."""
        if conversion.converter is None:
            ((key,),) = conversion.keys.values()
            return {conversion.name: self._source.shape(key)}
        try:
            tensors = {
                pattern: [torch.empty(self._source.shape(key), device="meta") for key in group]
                for pattern, group in conversion.keys.items()
            }
            made = self._convert(conversion, tensors)
            conversion.stacks = self._stacks(conversion, tensors, made)
        except Exception as error:  # whatever transformers' code raises
            lines = str(error).strip().splitlines() or [""]
            raise OneLLMError(
                f"{conversion.name} cannot be made of the weights that are stored for it: "
                f"{', '.join(key for group in conversion.keys.values() for key in group[:2])}, ... "
                f"({type(error).__name__}: {lines[0]})",
                f"transformers converts them ({type(conversion.converter.operations[0]).__name__}, "
                "...) in a way that cannot be applied to one parameter at a time.",
                "save the model again with the installed transformers, or use another LLM.",
            ) from None
        return {name: tuple(tensor.shape) for name, tensor in made.items()}

    def _stacks(
        self,
        conversion: _Conversion,
        tensors: Mapping[str, list[torch.Tensor]],
        made: Mapping[str, torch.Tensor],
    ) -> bool:
        """Whether the rows of a parameter are the stored weights, one each."""
        first = conversion.converter.operations[0] if conversion.converter else None
        counts = {len(group) for group in tensors.values()}
        if not isinstance(first, MergeModulelist) or first.dim or len(counts) > 1:
            return False
        one = self._convert(conversion, {p: group[:1] for p, group in tensors.items()})
        (count,) = counts
        return one.keys() == made.keys() and all(
            tuple(t.shape) == (count, *one[n].shape[1:]) and one[n].shape[0] == 1
            for n, t in made.items()
        )

    def _convert(
        self, conversion: _Conversion, tensors: Mapping[str, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Apply transformers' conversion: name of a parameter -> its values."""
        converter: Any = copy.deepcopy(conversion.converter)
        for pattern, group in tensors.items():
            for key, tensor in zip(conversion.keys[pattern], group, strict=False):
                converter.add_tensor(conversion.name, key, pattern, tensor)
        made = converter.convert(conversion.name, model=self._shapes, config=self._config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}


class _Shapes:
    """The parameters of a model as they are when it is opened, without their values."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self._parameters = {
            name: torch.empty(p.shape, device="meta") for name, p in model.named_parameters()
        }

    def get_parameter(self, name: str) -> torch.Tensor:
        """A tensor of a parameter's shape on the meta device."""
        return self._parameters[name]


def _plan(model: Any, names: Iterable[str]) -> list[_Conversion]:
    """How each parameter is made, as transformers decides it when it loads a checkpoint."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, _Conversion] = {}
    for key in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:  # it is reported under its own name, or that of fused experts
            name, pattern = (key if pattern is None else name), None
        if pattern is None:
            found[name] = _Conversion(name, None, {key: [key]})
            continue
        conversion = found.setdefault(name, _Conversion(name, by_pattern[pattern], {}))
        conversion.keys.setdefault(pattern, []).append(key)
    return list(found.values())
