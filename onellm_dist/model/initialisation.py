"""Random weights: each parameter is a pure function of the seed, its name and its shape.

The distributions are those of the reference's code. Adding an expert or a modality later moves no
other parameter, and a sharded model can be filled one parameter at a time.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from onellm_dist.common.errors import OneLLMError

_Fill = Callable[[torch.Tensor, torch.Generator], object]


def _constant(value: float) -> _Fill:
    return lambda tensor, generator: tensor.fill_(value)


def _normal(std: float) -> _Fill:
    return lambda tensor, generator: tensor.normal_(0, std, generator=generator)


def _fill_by_width(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """CLIP: normal with standard deviation width ** -0.5, where the width is the last dimension."""
    return tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)


def _fill_by_rows(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """CLIP's `proj`: as `_fill_by_width`, but the width is the first dimension."""
    return tensor.normal_(0, tensor.shape[0] ** -0.5, generator=generator)


def _fill_unit(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return tensor.uniform_(0, 1, generator=generator)


def _fill_xavier(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return nn.init.xavier_uniform_(tensor, generator=generator)


def _fill_default(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights of torch's Linear and Conv: Kaiming uniform with a = sqrt(5)."""
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


_RULES: tuple[tuple[str, _Fill], ...] = (
    # The encoder, as open_clip 3.3's VisionTransformer.
    (r"encoder\.(ln_\w+|blocks\.\d+\.ln_\d)\.weight", _constant(1)),
    (r"encoder\.(ln_\w+|blocks\.\d+\.ln_\d)\.bias", _constant(0)),
    (r"encoder\.(class_token|positions|registers)\.weight", _fill_by_width),
    (r"encoder\.blocks\.\d+\.ls_\d\.weight", _constant(1e-5)),  # timm's DINOv2
    (r"encoder\.proj\.weight", _fill_by_rows),
    (r"encoder\.blocks\.\d+\.attn\.(qkv|out)\.bias", _constant(0)),
    (r"encoder\.blocks\.\d+\.attn\.qkv\.weight", _fill_xavier),
    # UPM and LLM: Xavier for linear maps, ones for norms (the reference's code).
    (r"(upm|llm)\..*norm\w*\.weight", _constant(1)),
    (r"llm\..*embed\w*\.weight", _normal(1.0)),
    (r"(upm|llm)\..*\.bias", _constant(0)),
    (r"(upm|llm)\..*\.weight", _fill_xavier),
    # The parts of each modality.
    (r"tokenizers\.\w+\.positions\.weight", _normal(0.02)),
    (r"projectors\.\w+\.queries\.weight", _normal(0.02)),
    (r"projectors\.\w+\.(start|end)_tag\.weight", _fill_unit),
    (r"projectors\.\w+\.span_positions\.weight", _constant(0)),  # at first as without them
    (r"projectors\.\w+\.\w+\.norm\.weight", _constant(1)),
    (r"projectors\.\w+\.\w+\.norm\.bias", _constant(0)),
    (r"(encoder|tokenizers|projectors)\..*\.weight", _fill_default),
)


@torch.no_grad()
def initialise(model: Any, seed: int, *, skip: tuple[str, ...] = ()) -> None:
    """Fill every parameter of a OneLLM in place.

    Experts beyond the first are copies of it where the config's `upm.init` is `copied`.

    Args:
        model: a OneLLM.
        seed: seed of all parameters.
        skip: beginnings of names that stay as they are (`llm.`, `encoder.`).

    Raises:
        OneLLMError: a parameter has no rule (a tokenizer with a new kind of weight).
    """
    for name, parameter in model.named_parameters():
        if not name.startswith(skip):
            fill_parameter(name, parameter, model, seed)
    if model.config.upm.init == "copied" and not "upm.".startswith(skip or ("\0",)):
        first, *others = model.upm.experts
        for expert in others:
            expert.load_state_dict(first.state_dict())


def fill_parameter(name: str, parameter: torch.Tensor, model: nn.Module, seed: int) -> None:
    """Fill one parameter by its name.

    Args:
        name: its name in the model.
        parameter: the tensor to fill.
        model: the model; it may be on the meta device.
        seed: seed of all parameters.

    Raises:
        OneLLMError: the parameter has no rule.
    """
    parameter.copy_(draw_parameter(name, parameter.shape, model, seed))


def draw_parameter(name: str, shape: torch.Size, model: nn.Module, seed: int) -> torch.Tensor:
    """A parameter's random values, fp32 on the CPU, so that they are the same on every device.

    Args:
        name: its name in the model.
        shape: its shape.
        model: the model; it may be on the meta device.
        seed: seed of all parameters.

    Raises:
        OneLLMError: the parameter has no rule.
    """
    generator = torch.Generator().manual_seed(
        zlib.crc32(f"{seed}/{name}".encode()) + (seed << 32) % (1 << 62)
    )
    values = torch.empty(shape, dtype=torch.float32)
    rule = next((fill for pattern, fill in _RULES if re.fullmatch(pattern, name)), None)
    if rule is not None:
        rule(values, generator)
    elif name.endswith(".bias"):
        weight = model.get_parameter(name.removesuffix("bias") + "weight")
        bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
        values.uniform_(-bound, bound, generator=generator)
    else:
        raise OneLLMError(
            f"no rule says how {name} is initialised",
            "it would stay undefined.",
            "add a rule to model/initialisation.py, or name the parameter weight or bias.",
        )
    return values


def get_drawn_name(name: str, model: Any) -> str:
    """Name of the parameter whose random values `name` starts with.

    It is the first expert's where the config's `upm.init` is `copied`, else `name` itself.
    """
    if model.config.upm.init != "copied":
        return name
    return re.sub(r"^upm\.experts\.\d+\.", "upm.experts.0.", name)
