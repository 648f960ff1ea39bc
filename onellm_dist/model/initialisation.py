"""Random weights: each parameter a pure function of (seed, its name, its shape), as facts of the reference's code say.

Adding an expert or a modality later moves no other parameter, and a sharded model can be filled one parameter at a time.
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


def _width_scaled(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """CLIP: normal with standard deviation width ** -0.5 (width: the last dimension; the first for `proj`)."""
    return tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)


def _unit(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return tensor.uniform_(0, 1, generator=generator)


def _xavier(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return nn.init.xavier_uniform_(tensor, generator=generator)


def _torch_default(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Torch's Linear and Conv weights: kaiming uniform with a = sqrt(5)."""
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


_RULES: tuple[tuple[str, _Fill], ...] = (
    # encoder: as open_clip 3.3's VisionTransformer
    (r"encoder\.(ln_\w+|blocks\.\d+\.ln_\d)\.weight", _constant(1)),
    (r"encoder\.(ln_\w+|blocks\.\d+\.ln_\d)\.bias", _constant(0)),
    (r"encoder\.(class_token|positions|registers)\.weight", _width_scaled),
    (r"encoder\.blocks\.\d+\.ls_\d\.weight", _constant(1e-5)),  # timm's DINOv2
    (r"encoder\.proj\.weight", lambda t, g: t.normal_(0, t.shape[0] ** -0.5, generator=g)),
    (r"encoder\.blocks\.\d+\.attn\.(qkv|out)\.bias", _constant(0)),
    (r"encoder\.blocks\.\d+\.attn\.qkv\.weight", _xavier),
    # UPM, LLM: xavier for linear maps, ones for norms (the reference's code)
    (r"(upm|llm)\..*norm\w*\.weight", _constant(1)),
    (r"llm\..*embed\w*\.weight", _normal(1.0)),
    (r"(upm|llm)\..*\.bias", _constant(0)),
    (r"(upm|llm)\..*\.weight", _xavier),
    # per modality
    (r"tokenizers\.\w+\.positions\.weight", _normal(0.02)),
    (r"projectors\.\w+\.queries\.weight", _normal(0.02)),
    (r"projectors\.\w+\.(start|end)_tag\.weight", _unit),
    (r"projectors\.\w+\.\w+\.norm\.weight", _constant(1)),
    (r"projectors\.\w+\.\w+\.norm\.bias", _constant(0)),
    (r"(encoder|tokenizers|projectors)\..*\.weight", _torch_default),
)


@torch.no_grad()
def initialise(model: Any, seed: int, *, skip: tuple[str, ...] = ()) -> None:
    """Fill every parameter of a OneLLM in place, except those whose name starts with one of `skip` (`llm.`, `encoder.`).

    Experts beyond the first are copies of it where the config's `upm.init` is `copied`.

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
    """Fill one parameter by its name."""
    parameter.copy_(drawn(name, parameter.shape, model, seed))


def drawn(name: str, shape: torch.Size, model: nn.Module, seed: int) -> torch.Tensor:
    """A parameter's values by its name, fp32 on the CPU, so that they are the same on every device.

    Args:
        model: may be on the meta device.
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
            "add one to model/initialisation.py, or name it weight or bias.",
        )
    return values


def drawn_as(name: str, model: Any) -> str:
    """The parameter whose values `name` starts with: the first expert's where the config's `upm.init` is `copied`, else its own."""
    return (
        re.sub(r"^upm\.experts\.\d+\.", "upm.experts.0.", name)
        if model.config.upm.init == "copied"
        else name
    )
