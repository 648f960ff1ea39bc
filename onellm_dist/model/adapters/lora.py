"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers, by PEFT (seen with 0.21).

PEFT wraps a layer `NAME` in a module that holds `NAME.base_layer`, `NAME.lora_A.default`,
`NAME.lora_B.default` and, for DoRA (arXiv 2402.09353), `NAME.lora_magnitude_vector.default`. The
layer then computes base + scaling x B A. Dropout is not used: a random mask would make what a
sample gives depend on the pack and the rank that it is in.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.common.extras import get_install_command
from onellm_dist.common.near_names import find_near_names
from onellm_dist.config.train_sections import LoraSection

ADAPTER = "default"
BASE = ".base_layer."
LORA_A = f".lora_A.{ADAPTER}.weight"
LORA_B = f".lora_B.{ADAPTER}.weight"
MAGNITUDE = f".lora_magnitude_vector.{ADAPTER}.weight"
PARTS = ("encoder", "upm", "llm")
"""Parts whose linear layers may have adapters."""
PATTERN = "*.lora_*"
"""Glob pattern of the parameters of adapters."""

T = TypeVar("T")


class BaseWeights(Protocol):
    """Something that has the values of parameters."""

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter along its first dimension."""


class Adapter(NamedTuple):
    """How the adapter of one layer is added to it."""

    scaling: float
    has_magnitude: bool
    """Whether the adapter is DoRA."""


def add_adapters(model: Any, section: LoraSection) -> list[str]:
    """Wrap the linear layers that a recipe names; they compute what they did until trained.

    Args:
        model: a OneLLM, on the meta device or not.
        section: the `train.lora` section.

    Returns:
        Names of the layers.

    Raises:
        UsageError: PEFT is not installed, or a pattern matches no linear layer.
    """
    peft = import_peft()
    targets = find_targets(model, section.targets)
    on_meta = next(model.parameters()).is_meta
    peft.inject_adapter_in_model(
        build_peft_config(section, targets), model, ADAPTER, low_cpu_mem_usage=on_meta
    )
    return targets


def build_peft_config(section: LoraSection, targets: Iterable[str]) -> Any:
    """PEFT's configuration of a recipe's adapters."""
    return import_peft().LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=0.0,
        target_modules=sorted(targets),
        use_rslora=section.rslora,
        use_dora=section.dora,
    )


def import_peft() -> Any:
    """The package PEFT.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise UsageError(
            "the package peft is not installed",
            "it makes the adapters of LoRA.",
            get_install_command("lora"),
        ) from None


def find_targets(model: Any, patterns: Iterable[str]) -> list[str]:
    """Names of the linear layers that patterns match.

    The LLM's head is matched by its own name alone: adapters usually leave it out.

    Args:
        model: a OneLLM.
        patterns: glob patterns of names of modules.

    Raises:
        UsageError: a pattern matches none, or the head, whose weight is tied to the embedding.
    """
    head = model.get_output_embeddings()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in PARTS
    }
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = [
            name
            for name, module in layers.items()
            if name == pattern or (module is not head and fnmatchcase(name, pattern))
        ]
        if not matched:
            raise _explain_no_target(pattern, layers)
        if any(layers[n] is head for n in matched) and (
            head.weight is model.get_input_embeddings().weight
        ):
            raise UsageError(
                f"train.lora.targets: {pattern} is the LLM's head, whose weight is tied to the "
                "token embedding",
                "an adapter would untie them, and a merged model could not be written.",
                "leave the head out.",
            )
        found |= dict.fromkeys(matched)
    return list(found)


def _explain_no_target(pattern: str, layers: Mapping[str, Any]) -> UsageError:
    near = find_near_names(pattern, layers)
    return UsageError(
        f"train.lora.targets: {pattern} matches no linear layer of encoder, UPM or LLM",
        "it would have no adapter.",
        f"did you mean {' or '.join(near)}?" if near else "llm.* is every linear layer of the LLM.",
    )


def list_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Name of each layer with an adapter to how that is added; {} for a model without adapters."""
    return {
        name: Adapter(module.scaling[ADAPTER], ADAPTER in module.lora_magnitude_vector)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and ADAPTER in getattr(module, "scaling", {})
    }


def list_foreign_reads(model: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """(module, parameter of another module that its forward reads), as DoRA does."""
    return [
        (module.lora_magnitude_vector[ADAPTER], parameter)
        for name, module in model.named_modules()
        if hasattr(module, "lora_magnitude_vector") and ADAPTER in module.lora_magnitude_vector
        for parameter in (module.base_layer.weight, module.lora_A[ADAPTER].weight)
    ]


def get_base_name(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(BASE, ".")


class AdapterWeights:
    """The values with which a model with adapters starts: PEFT's own initialisation.

    Each A is a function of seed, name and shape, B is 0, and DoRA's magnitudes are the norms of the
    rows of the base.

    Args:
        base: the values of the model without adapters.
        shapes: shape of each parameter of the model with adapters.
        seed: the run's seed.
    """

    def __init__(self, base: BaseWeights, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self._base = base
        self._shapes = shapes
        self._seed = seed

    @torch.no_grad()
    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows [first, end) of a parameter along its first dimension."""
        if name.endswith(LORA_A):
            key = zlib.crc32(f"{self._seed}/{name}".encode()) + (self._seed << 32) % (1 << 62)
            values = torch.empty(self._shapes[name], dtype=torch.float32)
            generator = torch.Generator().manual_seed(key)
            return nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)[first:end]
        if name.endswith(LORA_B):
            return torch.zeros(end - first, *self._shapes[name][1:])
        if name.endswith(MAGNITUDE):
            weight = f"{name.removesuffix(MAGNITUDE)}.weight"
            norms: torch.Tensor = torch.linalg.norm(
                self._base.rows(weight, first, end).float(), dim=1
            )
            return norms
        return self._base.rows(get_base_name(name), first, end)


def merge_weight(
    base: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """The weight of a layer with its adapter added, in the dtype of the base.

    Args:
        base: [out, in].
        a: [rank, in].
        b: [out, rank].
        magnitude: [out], of DoRA, in the dtype in which the run computed.
        scaling: factor of `b @ a`.
    """
    merged = base.float() + scaling * (b.float() @ a.float())
    if magnitude is not None:
        # The norm in the precision in which the run computed it: B = 0 then changes nothing.
        norm = torch.linalg.norm(merged, dim=1).to(magnitude.dtype).float()
        merged = merged * (magnitude.float() / norm)[:, None]
    return merged.to(base.dtype)


def fold_adapters(
    items: Iterable[tuple[str, T]], adapters: Mapping[str, Adapter]
) -> Iterator[tuple[str, list[T], Adapter | None]]:
    """Collect the parts of each layer with an adapter under the name that its weight has without.

    Args:
        items: name and value of each parameter, in the order of the model.
        adapters: name of each layer with an adapter to how that is added.

    Yields:
        (name, values, adapter): the values of base, A, B and for DoRA the magnitude; or a single
        value and None, for any other parameter.
    """
    held: dict[str, list[T]] = {}
    ends = (f"{BASE}weight", LORA_A, LORA_B, MAGNITUDE)
    for name, value in items:
        end = next((end for end in ends if name.endswith(end)), None)
        layer = name.removesuffix(end or "")
        if end is None or layer not in adapters:
            yield get_base_name(name), [value], None
            continue
        parts = held.setdefault(layer, [])
        parts.append(value)
        adapter = adapters[layer]
        if len(parts) == 3 + adapter.has_magnitude:
            yield f"{layer}.weight", held.pop(layer), adapter


def merge_parts(parts: list[torch.Tensor], adapter: Adapter | None) -> torch.Tensor:
    """What `fold_adapters` yields of tensors as one tensor."""
    if adapter is None:
        return parts[0]
    base, a, b, *magnitude = parts
    return merge_weight(base, a, b, magnitude[0] if magnitude else None, adapter.scaling)
