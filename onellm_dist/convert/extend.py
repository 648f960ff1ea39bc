"""Give a trained model more experts and more modalities."""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import OpenedCheckpoint
from onellm_dist.convert.new_parameters import copy_projector, draw_tensors
from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.spans.positions import SPAN_ROWS

CLOSED_BIAS = -20.0
"""Router bias of an added expert in old modalities. Its weight is sigmoid(-20) = 2e-9, below fp32's
rounding of the sum of the others."""
EXPERT_NOISE = 0.01
"""Matrices of copied experts are multiplied by 1 + this x a standard normal number. Without it,
copies with equal router weights, as added ones have at first, would get equal gradients forever."""


@dataclass(frozen=True)
class Additions:
    """What a trained model gets.

    Attributes:
        experts: experts to add. With a constant router the outputs change, and they must be copies.
        modalities: modalities to add. Projections, queries, router and tags start as those of the
            first modality (image; paper, section 3.3), with added experts open; a tokenizer and its
            positions are random, and learned span positions zero.
        expert_init: `copied` (from the first expert, with some noise) or `separate` (random).
        expert_noise: see EXPERT_NOISE; None: EXPERT_NOISE, or 0 with a constant router.
        router_bias: router bias of added experts in old modalities; its sigmoid is their weight
            there.
    """

    experts: int = 0
    modalities: Sequence[str] = ()
    expert_init: str = "copied"
    expert_noise: float | None = None
    router_bias: float = CLOSED_BIAS


def extend_model(opened: OpenedCheckpoint, additions: Additions, seed: int) -> OpenedCheckpoint:
    """Add experts and modalities to a trained model.

    Args:
        opened: the model.
        additions: what it gets.
        seed: seed of noise and random parts.

    Raises:
        UsageError: the model cannot be extended so.
    """
    if additions.experts:
        opened = extend_experts(opened, additions, seed)
    if additions.modalities:
        opened = extend_modalities(
            opened, additions.modalities, seed, added_experts=additions.experts
        )
    return opened


def extend_experts(opened: OpenedCheckpoint, additions: Additions, seed: int) -> OpenedCheckpoint:
    """Add experts that are closed for the model's modalities.

    The router's new rows are zero with a bias. The outputs of a soft router stay the same to fp32's
    rounding, and a sparse one never picks a new expert before it learns to.

    Args:
        opened: the model.
        additions: number, initialisation and bias of the new experts.
        seed: seed of noise and random parts.

    Raises:
        UsageError: an unknown initialisation, or a constant router whose outputs would change.
    """
    config = copy.deepcopy(opened.config)
    before, count, init = config.upm.experts, additions.experts, additions.expert_init
    _check_experts(config, additions)
    config.upm.experts = before + count
    config.upm.init = "separate"
    noise = additions.expert_noise
    if noise is None:
        noise = 0.0 if config.upm.router == "constant" else EXPERT_NOISE
    names = [n for k in range(before, before + count) for n in _list_expert(opened.tensors, k)]
    drawn = draw_tensors(config, seed, names)
    tensors = dict(opened.tensors)
    for name, random in drawn.items():
        first = opened.tensors[re.sub(r"^upm\.experts\.\d+\.", "upm.experts.0.", name)]
        copied = _add_noise(first, name, noise, seed)
        tensors[name] = copied if init == "copied" else random.cast(first.dtype)
    for name, tensor in opened.tensors.items():
        if re.fullmatch(r"projectors\.\w+\.router\.fc2\.(weight|bias)", name):
            bias = additions.router_bias if name.endswith("bias") else 0.0
            tensors[name] = _add_rows(tensor, count, bias)
    copies = f", noise {noise}" if init == "copied" else ""
    about = (
        f"{count}, {init} (seed {seed}{copies}), router weights of old modalities at "
        f"sigmoid({additions.router_bias})"
    )
    return replace(
        opened,
        config=config,
        tensors=tensors,
        notes={**opened.notes, "added experts": about},
        initialised=(*opened.initialised, *(drawn if init == "separate" else ())),
    )


def _check_experts(config: OneLLMConfig, additions: Additions) -> None:
    """Check that experts can be added to a model."""
    if additions.expert_init not in ("copied", "separate"):
        raise UsageError(
            f"--expert-init {additions.expert_init}",
            "experts are copied or separate.",
            "use one of the two.",
        )
    is_copy_of_one = additions.expert_init == "copied" and config.upm.experts == 1
    if config.upm.router == "constant" and not is_copy_of_one:
        total = config.upm.experts + additions.experts
        raise UsageError(
            f"the router is constant: each of {total} experts would weigh 1/{total}",
            "the trained modalities' outputs would change at once.",
            "extend a constant router from one expert, by copies.",
        )


def extend_modalities(
    opened: OpenedCheckpoint, names: Sequence[str], seed: int, *, added_experts: int = 0
) -> OpenedCheckpoint:
    """Add modalities; nothing of the old ones changes.

    Args:
        opened: the model.
        names: modalities to add.
        seed: seed of random tokenizers.
        added_experts: experts that were just added, which new modalities may use at once.

    Raises:
        UsageError: an unknown modality, or one that the model has already.
    """
    config = copy.deepcopy(opened.config)
    check_modalities(names)
    if present := [name for name in names if name in config.modalities]:
        raise UsageError(
            f"the model has {', '.join(present)} already",
            "its weights would be lost.",
            "leave it out.",
        )
    source = config.modalities[0]
    config.modalities = sorted(
        dict.fromkeys([*config.modalities, *names]), key=lambda name: get_modality(name).order
    )
    dtype = opened.tensors[f"projectors.{source}.queries.weight"].dtype
    prefixes = tuple(f"tokenizers.{name}." for name in names)
    # Learned rows are those of image's tiles: others start at zero.
    rows = tuple(f"projectors.{name}{SPAN_ROWS}" for name in names)
    random = {
        name: tensor.cast(dtype)
        for name, tensor in draw_tensors(config, seed).items()
        if name.startswith((*prefixes, *rows))
    }
    tensors: Tensors = {**opened.tensors, **random}
    for name in names:
        tensors |= copy_projector(opened.tensors, source, name)
        bias = f"projectors.{name}.router.fc2.bias"
        if added_experts and bias in tensors:
            tensors[bias] = _zero_last(tensors[bias], added_experts)
    about = f"{', '.join(names)} from {source}, tokenizers random (seed {seed})"
    return replace(
        opened,
        config=config,
        tensors=tensors,
        notes={**opened.notes, "added modalities": about},
        initialised=(*opened.initialised, *random),
    )


def check_modalities(names: Sequence[str]) -> None:
    """Check that all modalities exist.

    Raises:
        UsageError: one is unknown.
    """
    unknown = [name for name in names if name not in all_modalities()]
    if unknown:
        raise UsageError(
            f"unknown modality {', '.join(unknown)}",
            "the model has no place for it.",
            f"known: {', '.join(all_modalities())}.",
        )


def _list_expert(tensors: Tensors, expert: int) -> list[str]:
    """Names of an expert's parameters."""
    first = "upm.experts.0."
    return [
        f"upm.experts.{expert}.{name.removeprefix(first)}"
        for name in tensors
        if name.startswith(first)
    ]


def _add_noise(tensor: LazyTensor, name: str, noise: float, seed: int) -> LazyTensor:
    """A matrix times 1 + noise x normal, drawn by seed and name; vectors (norms) as they are."""
    if not noise or len(tensor.shape) < 2:
        return tensor

    def multiply(t: torch.Tensor) -> torch.Tensor:
        # The word `shaken` is a part of the seed: other noise would come from another word.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/shaken/{name}".encode()))
        return (t.float() * (1 + noise * torch.randn(t.shape, generator=generator))).to(t.dtype)

    return tensor.map(multiply)


def _add_rows(tensor: LazyTensor, count: int, value: float) -> LazyTensor:
    def extend(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, torch.full((count, *t.shape[1:]), value, dtype=t.dtype)])

    return tensor.map(extend, shape=(tensor.shape[0] + count, *tensor.shape[1:]))


def _zero_last(bias: LazyTensor, count: int) -> LazyTensor:
    """A router's bias with its last entries at zero: added experts are open."""

    def zero(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[-count:] = 0
        return t

    return bias.map(zero)
