"""Parameters that come from no file: drawn by name and seed, one at a time, as `model/initialisation.py` draws them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from onellm_dist.convert.checkpoint import Tensors
from onellm_dist.convert.tensors.lazy import LazyTensor
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.initialisation import fill_parameter
from onellm_dist.model.onellm import OneLLMForConditionalGeneration


def meta_onellm(config: OneLLMConfig) -> OneLLMForConditionalGeneration:
    """The model without memory."""
    with torch.device("meta"):
        return OneLLMForConditionalGeneration(config)


def fresh_tensors(config: OneLLMConfig, seed: int, names: Iterable[str] | None = None) -> Tensors:
    """The tensors that `initialise(model, seed)` would fill, fp32, not drawn before they are read.

    Args:
        names: of those wanted; all where None.
    """
    model = meta_onellm(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return {
        name: _drawn(name, wanted[name], model, seed)
        for name in (wanted if names is None else names)
    }


def _drawn(
    name: str, shape: tuple[int, ...], model: OneLLMForConditionalGeneration, seed: int
) -> LazyTensor:
    source = name
    if model.config.upm.init == "copied":  # every expert starts as the first
        source = re.sub(r"^upm\.experts\.\d+\.", "upm.experts.0.", name)

    def load() -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.float32)
        with torch.no_grad():
            fill_parameter(source, values, model, seed)
        return values

    return LazyTensor(shape, torch.float32, load)


def copied_projector(tensors: Mapping[str, LazyTensor], source: str, target: str) -> Tensors:
    """`source`'s projections, queries, router and tags as those of `target` (paper, section 3.3)."""
    prefix = f"projectors.{source}."
    return {
        f"projectors.{target}." + n.removeprefix(prefix): t
        for n, t in tensors.items()
        if n.startswith(prefix)
    }
