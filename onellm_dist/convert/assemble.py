"""Put a model together: an LLM and an encoder, ready for stage I; or extend a trained model.

A trained model can get more experts and more modalities.
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import (
    KINDS,
    ConversionOptions,
    OpenedCheckpoint,
    add_prefix,
)
from onellm_dist.convert.conversion import write_output
from onellm_dist.convert.formats import onellm
from onellm_dist.convert.new_parameters import copy_projector, draw_tensors
from onellm_dist.convert.opening import open_checkpoint
from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors
from onellm_dist.convert.towers import is_tower, open_tower
from onellm_dist.modalities import all_modalities
from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig

CLOSED_BIAS = -20.0
"""Router bias of an added expert in old modalities. Its weight is sigmoid(-20) = 2e-9, below fp32's
rounding of the sum of the others."""
UPM_HEAD_WIDTH = 64
"""Channels of a head of a new UPM."""
EXPERT_NOISE = 0.01
"""Matrices of copied experts are multiplied by 1 + this x a standard normal number. Without it,
copies with equal router weights, as added ones have at first, would get equal gradients forever."""


@dataclass(frozen=True)
class UPMSizes:
    """The universal projection module of a new model; the defaults are the paper's.

    Attributes:
        experts: number of experts.
        blocks: blocks of an expert.
        router: `soft`, `constant` or `sparse`.
        init: `separate`, or `copied`: all experts start as the first.
        heads: attention heads; None: width / 64.
        ffn: hidden channels of a block; None: 11 / 4 of the width.
        router_hidden: hidden channels of the router; None: 4 times the width.
    """

    experts: int = 3
    blocks: int = 8
    router: str = "soft"
    init: str = "separate"
    heads: int | None = None
    ffn: int | None = None
    router_hidden: int | None = None


def assemble(
    out: Path,
    *,
    llm: Path | None = None,
    encoder: Path | str | None = None,
    base: Path | None = None,
    upm: UPMSizes | None = None,
    modalities: Sequence[str] | None = None,
    add_experts: int = 0,
    add_modalities: Sequence[str] = (),
    expert_init: str = "copied",
    expert_noise: float | None = None,
    router_bias: float = CLOSED_BIAS,
    seed: int = 0,
    options: ConversionOptions | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> tuple[OpenedCheckpoint, dict[str, Any]]:
    """Write a onellm directory made of parts.

    Args:
        out: the directory to write.
        llm: a checkpoint of any format that has an LLM.
        encoder: a checkpoint of any format that has an encoder, or `timm:NAME` or `open-clip:NAME`
            (see towers.py). Everything between LLM and encoder is initialised from `seed`.
        base: a onellm model to extend, in place of `llm` and `encoder`.
        upm: sizes of a new model's UPM.
        modalities: modalities of a new model; default: all.
        add_experts: experts to add to `base`. Their router weights in old modalities start at
            sigmoid(`router_bias`). With a constant router the outputs change, and an added expert
            must be a copy.
        add_modalities: modalities to add to `base`. Projections, queries, router and tags start as
            those of the first modality (image; paper, section 3.3), with added experts open; a
            tokenizer and its positions are random.
        expert_init: `copied` (from the first expert) or `separate` (random).
        expert_noise: what breaks the symmetry of copies; default: EXPERT_NOISE, or 0 with a
            constant router.
        router_bias: router bias of added experts in old modalities.
        seed: seed of random parts.
        options: what the user chose.
        overwrite: replace a folder that an earlier conversion wrote.
        quiet: show no progress.

    Returns:
        (the model, the content of `conversion.json`).

    Raises:
        UsageError: parts are missing or do not fit, a name is unknown, or `out` exists.
    """
    options = options or ConversionOptions()
    _check_parts(llm, encoder, base, extends=bool(add_experts or add_modalities))
    if base is not None:
        opened = _open_part(base, "onellm", options)
        if add_experts:
            opened = extend_experts(
                opened, add_experts, expert_init, router_bias, seed, expert_noise
            )
        if add_modalities:
            opened = extend_modalities(opened, add_modalities, seed, added_experts=add_experts)
    else:
        assert llm is not None and encoder is not None  # checked above
        llm_part = _open_part(llm, "llm", options)
        encoder_part = _open_part(encoder, "encoder", options)
        opened = build_new_model(llm_part, encoder_part, upm or UPMSizes(), modalities, seed)
    plan = onellm.plan_output(opened, options)
    record = write_output(
        opened, plan, out, target="onellm", options=options, overwrite=overwrite, quiet=quiet
    )
    return opened, record


def _check_parts(
    llm: Path | None, encoder: Path | str | None, base: Path | None, *, extends: bool
) -> None:
    if base is not None:
        if llm or encoder:
            raise UsageError(
                "--base and --llm/--encoder exclude each other",
                "a model is new or extended.",
                "give one or the other.",
            )
        return
    if llm is None or encoder is None:
        raise UsageError(
            "--llm and --encoder are both needed",
            "a new model has both.",
            "or give --base to extend a model.",
        )
    if extends:
        raise UsageError(
            "--add-experts and --add-modality extend a model",
            "no model is given.",
            "give --base, or --experts and --modality.",
        )


def _open_part(path: Path | str, kind: str, options: ConversionOptions) -> OpenedCheckpoint:
    if kind == "encoder" and is_tower(str(path)):
        return open_tower(str(path))
    opened = open_checkpoint(Path(path), options).check(options)
    if kind == "encoder" and opened.kind == "llm":
        raise UsageError(
            f"{path} is {KINDS['llm']}, not {KINDS['encoder']}",
            "the encoder reads pictures.",
            "give a CLIP.",
        )
    return opened.get_part(kind)


def build_new_model(
    llm: OpenedCheckpoint,
    encoder: OpenedCheckpoint,
    sizes: UPMSizes,
    modalities: Sequence[str] | None,
    seed: int,
) -> OpenedCheckpoint:
    """An LLM and an encoder, with everything between them random.

    Args:
        llm: the LLM.
        encoder: the encoder.
        sizes: sizes of the UPM.
        modalities: modalities of the model; default: all.
        seed: seed of random parts.

    Raises:
        UsageError: an unknown modality, or sizes that do not fit.
    """
    _check_modalities(modalities or ())
    width = encoder.config.width
    upm = OneLLMUPMConfig(
        experts=sizes.experts,
        blocks=sizes.blocks,
        router=sizes.router,
        init=sizes.init,
        heads=sizes.heads or max(1, width // UPM_HEAD_WIDTH),
        ffn=sizes.ffn or width * 11 // 4,  # 2816 at a width of 1024
        router_hidden=sizes.router_hidden or 4 * width,
    )
    config = OneLLMConfig(
        vision=encoder.config, upm=upm, text_config=llm.config, modalities=modalities
    )
    given = {**add_prefix(encoder.tensors, "encoder."), **add_prefix(llm.tensors, "llm.")}
    drawn = {name: t for name, t in draw_tensors(config, seed).items() if name not in given}
    notes = {
        "llm": llm.format,
        "encoder": encoder.notes.get("tower", encoder.format),
        "initialisation": f"seed {seed}, experts {sizes.init}",
        "stage": "ready for align",
    }
    return OpenedCheckpoint(
        "assemble",
        "onellm",
        config,
        {**drawn, **given},
        (*llm.files, *encoder.files),
        llm.root,
        (*llm.ignored, *encoder.ignored),
        (*llm.problems, *encoder.problems),
        notes,
        tuple(drawn),
    )


def extend_experts(
    opened: OpenedCheckpoint,
    count: int,
    init: str,
    router_bias: float,
    seed: int,
    noise: float | None = None,
) -> OpenedCheckpoint:
    """Add experts that are closed for the model's modalities.

    The router's new rows are zero with the bias `router_bias`. The outputs of a soft router stay
    the same to fp32's rounding, and a sparse one never picks a new expert before it learns to.

    Args:
        opened: the model.
        count: experts to add.
        init: `copied` (from the first expert, with some noise) or `separate` (random).
        router_bias: router bias of the new experts.
        seed: seed of noise and random parts.
        noise: see EXPERT_NOISE; default: EXPERT_NOISE, or 0 with a constant router.

    Raises:
        UsageError: an unknown `init`, or a constant router whose outputs would change.
    """
    config = copy.deepcopy(opened.config)
    before = config.upm.experts
    if init not in ("copied", "separate"):
        raise UsageError(
            f"--expert-init {init}", "experts are copied or separate.", "use one of the two."
        )
    if config.upm.router == "constant" and (init != "copied" or before != 1):
        total = before + count
        raise UsageError(
            f"the router is constant: each of {total} experts would weigh 1/{total}",
            "the trained modalities' outputs would change at once.",
            "extend a constant router from one expert, by copies.",
        )
    config.upm.experts = before + count
    config.upm.init = "separate"
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
            tensors[name] = _add_rows(tensor, count, router_bias if name.endswith("bias") else 0.0)
    copies = f", noise {noise}" if init == "copied" else ""
    about = (
        f"{count}, {init} (seed {seed}{copies}), router weights of old modalities at "
        f"sigmoid({router_bias})"
    )
    initialised = (*opened.initialised, *drawn) if init == "separate" else opened.initialised
    return replace(
        opened,
        config=config,
        tensors=tensors,
        notes={**opened.notes, "added experts": about},
        initialised=initialised,
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
    _check_modalities(names)
    if present := [name for name in names if name in config.modalities]:
        raise UsageError(
            f"the model has {', '.join(present)} already",
            "its weights would be lost.",
            "leave it out.",
        )
    source = config.modalities[0]
    new = OneLLMConfig(
        vision=config.vision,
        upm=config.upm,
        text_config=config.text_config,
        modalities=[*config.modalities, *names],
    )
    dtype = opened.tensors[f"projectors.{source}.queries.weight"].dtype
    prefixes = tuple(f"tokenizers.{name}." for name in names)
    random = {
        name: tensor.cast(dtype)
        for name, tensor in draw_tensors(new, seed).items()
        if name.startswith(prefixes)
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
        config=new,
        tensors=tensors,
        notes={**opened.notes, "added modalities": about},
        initialised=(*opened.initialised, *random),
    )


def _check_modalities(names: Sequence[str]) -> None:
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
