"""Adapters that are merged into the tensors of their base, layer by layer, when these are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import KeyProblem
from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors
from onellm_dist.model.adapters.lora import LORA_A, LORA_B, MAGNITUDE, merge_weight


def split_adapters(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Separate the parameters of adapters from the others: (adapters, others)."""
    adapters = {name: t for name, t in tensors.items() if ".lora_" in name}
    return adapters, {name: t for name, t in tensors.items() if name not in adapters}


def merge_adapters(
    base: Tensors, adapters: Tensors, scaling: float, dtype: torch.dtype | None
) -> tuple[Tensors, list[KeyProblem]]:
    """Merge adapters into their base.

    Args:
        base: the tensors of the base.
        adapters: those of the adapters, by the names of their parameters in the model.
        scaling: factor of the product of the two matrices of an adapter.
        dtype: base and adapters are rounded to it first, as in a run that computes in it.

    Returns:
        (the tensors of the merged model, adapters that do not fit the base).
    """
    merged = dict(base)
    problems = []
    for name, a in adapters.items():
        if not name.endswith(LORA_A):
            continue
        layer = name.removesuffix(LORA_A)
        weight, b = base.get(f"{layer}.weight"), adapters.get(f"{layer}{LORA_B}")
        if weight is None or b is None or (b.shape[0], a.shape[1]) != weight.shape:
            problems.append(KeyProblem("unexpected", name, str(list(a.shape))))
            continue
        parts = [weight, a, b, adapters.get(f"{layer}{MAGNITUDE}")]
        cast = [t if t is None or dtype is None else t.cast(dtype) for t in parts]
        merged[f"{layer}.weight"] = _merge_layer(cast, scaling)
    known = {n.removesuffix(LORA_A) for n in adapters if n.endswith(LORA_A)}
    problems += [
        KeyProblem("unexpected", name, str(list(t.shape)))
        for name, t in adapters.items()
        if name.split(".lora_", 1)[0] not in known
    ]
    return merged, problems


def compute_scaling(section: Mapping[str, object]) -> float:
    """The factor of an adapter, by the keys `rank`, `alpha` and `rslora` of a checkpoint.

    Raises:
        UsageError: one of them is missing or not a number.
    """
    try:
        rank, alpha = int(str(section["rank"])), float(str(section["alpha"]))
        return alpha / (rank**0.5 if section.get("rslora") else rank)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"the adapters have no scale: {error}",
            "it says how much they count.",
            "give the checkpoint as the run wrote it.",
        ) from None


def _merge_layer(parts: list[LazyTensor | None], scaling: float) -> LazyTensor:
    weight, a, b, magnitude = parts
    assert weight is not None and a is not None and b is not None

    def load() -> torch.Tensor:
        norms = None if magnitude is None else magnitude.read()
        return merge_weight(weight.read(), a.read(), b.read(), norms, scaling)

    return LazyTensor(weight.shape, weight.dtype, load)
