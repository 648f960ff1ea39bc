"""Parameters that come from no file: they are drawn by name and seed, or copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.initialisation import draw_parameter, get_drawn_name
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.spans.positions import SPAN_ROWS


def draw_tensors(config: OneLLMConfig, seed: int, names: Iterable[str] | None = None) -> Tensors:
    """The tensors that `initialise(model, seed)` would fill, fp32; each is drawn when it is read.

    Args:
        config: config of the model.
        seed: seed of all parameters.
        names: names of the parameters that are wanted; default: all.
    """
    with torch.device("meta"):
        model = OneLLMForConditionalGeneration(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {
        name: _draw_later(name, shapes[name], model, seed)
        for name in (shapes if names is None else names)
    }


def _draw_later(
    name: str, shape: torch.Size, model: OneLLMForConditionalGeneration, seed: int
) -> LazyTensor:
    source = get_drawn_name(name, model)

    @torch.no_grad()
    def load() -> torch.Tensor:
        return draw_parameter(source, shape, model, seed)

    return LazyTensor(tuple(shape), torch.float32, load)


def copy_projector(tensors: Mapping[str, LazyTensor], source: str, target: str) -> Tensors:
    """A modality's projections, queries, router and tags as another's (paper, section 3.3).

    As in a run's `model.init_from_image`, learned span positions are not copied.

    Args:
        tensors: tensors of the model.
        source: name of the modality that has them.
        target: name of the modality that gets them.
    """
    prefix = f"projectors.{source}."
    return {
        f"projectors.{target}." + name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.endswith(SPAN_ROWS)
    }
