"""`onellm convert assemble`: an LLM and an encoder as a model ready for stage I, or a trained model with more experts or modalities."""

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
from onellm_dist.convert.checkpoint import KINDS, Opened, Options, Tensors, with_prefix
from onellm_dist.convert.conversion import emit
from onellm_dist.convert.formats import onellm
from onellm_dist.convert.new_parameters import copied_projector, fresh_tensors
from onellm_dist.convert.registry import format_of, recognised
from onellm_dist.convert.tensors.lazy import LazyTensor
from onellm_dist.convert.towers import is_tower, open_tower
from onellm_dist.modalities import all_modalities
from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig

CLOSED = -20.0
"""Router bias of an added expert in old modalities: its gate is sigmoid(-20) = 2e-9, below fp32's rounding of the others' sum."""
UPM_HEAD_WIDTH = 64
EXPERT_NOISE = 0.01
"""Copied experts' matrices are multiplied by 1 + this x a standard normal number. Without it, copies that share their gates (as added
ones do at first) would get the same gradients for ever."""


@dataclass(frozen=True)
class UPMSizes:
    """The universal projection module of a new model (the paper's by default); None follows from the encoder's width."""

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
    gate_bias: float = CLOSED,
    seed: int = 0,
    options: Options | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> tuple[Opened, dict[str, Any]]:
    """Write a onellm directory made of parts.

    Args:
        llm, encoder: checkpoints of any format with such a part; everything between them is initialised from `seed`. The encoder may also
            be `timm:NAME` or `open-clip:NAME` (towers.py).
        base: or a onellm model to extend.
        modalities: of a new model; all where None.
        add_experts: experts added to `base`: copies of its first (`expert_init="copied"`) or random (`separate`). Old modalities' gates of
            them start at sigmoid(`gate_bias`); with the router `constant` the outputs change, and an added expert must be a copy.
        add_modalities: modalities added to `base`: projections, queries, router and tags start as the first modality's (image's; paper,
            section 3.3), with gates of added experts open; a tokenizer and its positions are random.
        expert_init: `copied` or `separate`.
        expert_noise: what breaks the symmetry of copies, see EXPERT_NOISE (the default; 0 for the router `constant`).

    Returns:
        (the model, the content of `conversion.json`).

    Raises:
        UsageError: parts are missing or do not fit, a name is unknown, or `out` is there.
    """
    options = options or Options()
    if base is not None and (llm or encoder):
        raise UsageError(
            "--base and --llm/--encoder exclude each other",
            "a model is new or extended.",
            "give one or the other.",
        )
    if base is None:
        if llm is None or encoder is None:
            raise UsageError(
                "--llm and --encoder are both needed",
                "a model has both.",
                "or give --base to extend a model.",
            )
        if add_experts or add_modalities:
            raise UsageError(
                "--add-experts and --add-modality extend a model",
                "none is given.",
                "give --base, or --experts and --modality.",
            )
        opened = new_model(
            _part(llm, "llm", options),
            _part(encoder, "encoder", options),
            upm or UPMSizes(),
            modalities,
            seed,
        )
    else:
        opened = _part(base, "onellm", options)
        opened = (
            with_experts(opened, add_experts, expert_init, gate_bias, seed, expert_noise)
            if add_experts
            else opened
        )
        opened = (
            with_modalities(opened, add_modalities, seed, added_experts=add_experts)
            if add_modalities
            else opened
        )
    plan = onellm.plan(opened, options)
    return opened, emit(
        opened, plan, out, target="onellm", options=options, overwrite=overwrite, quiet=quiet
    )


def _part(path: Path | str, kind: str, options: Options) -> Opened:
    if kind == "encoder" and is_tower(str(path)):
        return open_tower(str(path))
    path = Path(path)
    opened = format_of(recognised(path)).open_checkpoint(path, options).checked(options)
    if kind == "encoder" and opened.kind == "llm":
        raise UsageError(
            f"{path} is {KINDS['llm']}, not {KINDS['encoder']}",
            "the encoder reads pictures.",
            "give a CLIP.",
        )
    return opened.as_kind(kind)


def new_model(
    llm: Opened, encoder: Opened, sizes: UPMSizes, modalities: Sequence[str] | None, seed: int
) -> Opened:
    """An LLM and an encoder with everything between them random."""
    _check_modalities(modalities or ())
    width = encoder.config.width
    upm = OneLLMUPMConfig(
        experts=sizes.experts,
        blocks=sizes.blocks,
        router=sizes.router,
        init=sizes.init,
        heads=sizes.heads or max(1, width // UPM_HEAD_WIDTH),
        ffn=sizes.ffn or width * 11 // 4,  # 2816 at 1024
        router_hidden=sizes.router_hidden or 4 * width,
    )
    config = OneLLMConfig(
        vision=encoder.config, upm=upm, text_config=llm.config, modalities=modalities
    )
    given = {**with_prefix(encoder.tensors, "encoder."), **with_prefix(llm.tensors, "llm.")}
    made = {name: t for name, t in fresh_tensors(config, seed).items() if name not in given}
    notes = {
        "llm": llm.format,
        "encoder": encoder.format,
        "initialisation": f"seed {seed}, experts {sizes.init}",
        "stage": "ready for align",
    }
    return Opened(
        "assemble",
        "onellm",
        config,
        {**made, **given},
        (*llm.files, *encoder.files),
        llm.root,
        (*llm.ignored, *encoder.ignored),
        (*llm.problems, *encoder.problems),
        notes | {"encoder": encoder.notes.get("tower", encoder.format)},
        tuple(made),
    )


def with_experts(
    opened: Opened, count: int, init: str, gate_bias: float, seed: int, noise: float | None = None
) -> Opened:
    """`opened` with `count` experts more, whose gates are closed for its modalities.

    The router's new rows are zero with the bias `gate_bias`, so that the outputs of a soft router stay the same to fp32's rounding, and a
    sparse one never picks the new experts before it learns to. Weights: a copy of the first expert with some noise, or random.

    Raises:
        UsageError: the router has no gates, and the experts could only change what the model says.
    """
    config = copy.deepcopy(opened.config)
    before = config.upm.experts
    if init not in ("copied", "separate"):
        raise UsageError(
            f"--expert-init {init}", "experts are copied or separate.", "use one of the two."
        )
    if config.upm.router == "constant" and (init != "copied" or before != 1):
        raise UsageError(
            f"the router is constant: each of {before + count} experts would weigh 1/{before + count}",
            "the trained modalities' outputs would change at once.",
            "grow a constant router from one expert, by copies.",
        )
    config.upm.experts = before + count
    config.upm.init = "separate"
    tensors = dict(opened.tensors)
    if noise is None:
        noise = 0.0 if config.upm.router == "constant" else EXPERT_NOISE
    drawn = fresh_tensors(
        config,
        seed,
        [n for k in range(before, before + count) for n in _expert_names(opened.tensors, k)],
    )
    for name, random in drawn.items():
        first = re.sub(r"^upm\.experts\.\d+\.", "upm.experts.0.", name)
        copied = _shaken(opened.tensors[first], name, noise, seed)
        tensors[name] = copied if init == "copied" else random.cast(opened.tensors[first].dtype)
    for name, tensor in opened.tensors.items():
        if re.fullmatch(r"projectors\.\w+\.router\.fc2\.(weight|bias)", name):
            tensors[name] = _more_rows(tensor, count, gate_bias if name.endswith("bias") else 0.0)
    shaken = f", noise {noise}" if init == "copied" else ""
    about = (
        f"{count}, {init} (seed {seed}{shaken}), gates of old modalities at sigmoid({gate_bias})"
    )
    notes = {**opened.notes, "added experts": about}
    made = (*opened.made, *drawn) if init == "separate" else opened.made
    return replace(opened, config=config, tensors=tensors, notes=notes, made=made)


def with_modalities(
    opened: Opened, names: Sequence[str], seed: int, *, added_experts: int = 0
) -> Opened:
    """`opened` with more modalities; nothing of the old ones changes."""
    config = copy.deepcopy(opened.config)
    _check_modalities(names)
    if there := [name for name in names if name in config.modalities]:
        raise UsageError(
            f"the model has {', '.join(there)} already",
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
    like = opened.tensors[f"projectors.{source}.queries.weight"].dtype
    random = {
        n: t.cast(like)
        for n, t in fresh_tensors(new, seed).items()
        if n.startswith(tuple(f"tokenizers.{name}." for name in names))
    }
    tensors: Tensors = {**opened.tensors, **random}
    for name in names:
        tensors |= copied_projector(opened.tensors, source, name)
        bias = f"projectors.{name}.router.fc2.bias"
        if (
            added_experts and bias in tensors
        ):  # a new modality may use the new experts from its first step on
            tensors[bias] = _opened_gates(tensors[bias], added_experts)
    notes = {
        **opened.notes,
        "added modalities": f"{', '.join(names)} from {source}, tokenizers random (seed {seed})",
    }
    return replace(opened, config=new, tensors=tensors, notes=notes, made=(*opened.made, *random))


def _check_modalities(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in all_modalities()]
    if unknown:
        raise UsageError(
            f"unknown modality {', '.join(unknown)}",
            "the model has no place for it.",
            f"known: {', '.join(all_modalities())}.",
        )


def _expert_names(tensors: Tensors, expert: int) -> list[str]:
    first = "upm.experts.0."
    return [
        f"upm.experts.{expert}.{name.removeprefix(first)}"
        for name in tensors
        if name.startswith(first)
    ]


def _shaken(tensor: LazyTensor, name: str, noise: float, seed: int) -> LazyTensor:
    """A matrix times 1 + noise x normal, drawn by seed and name; vectors (norms) as they are."""
    if not noise or len(tensor.shape) < 2:
        return tensor

    def shake(t: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/shaken/{name}".encode()))
        return (t.float() * (1 + noise * torch.randn(t.shape, generator=generator))).to(t.dtype)

    return tensor.mapped(shake)


def _more_rows(tensor: LazyTensor, count: int, value: float) -> LazyTensor:
    def grown(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, torch.full((count, *t.shape[1:]), value, dtype=t.dtype)])

    return tensor.mapped(grown, shape=(tensor.shape[0] + count, *tensor.shape[1:]))


def _opened_gates(bias: LazyTensor, count: int) -> LazyTensor:
    def zeroed(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[-count:] = 0
        return t

    return bias.mapped(zeroed)
