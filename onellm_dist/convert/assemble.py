"""Put a model together from an LLM and an encoder, or extend a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import (
    KINDS,
    ConversionOptions,
    OpenedCheckpoint,
    add_prefix,
)
from onellm_dist.convert.conversion import write_output
from onellm_dist.convert.extend import Additions, check_modalities, extend_model
from onellm_dist.convert.formats import onellm
from onellm_dist.convert.new_parameters import draw_tensors
from onellm_dist.convert.opening import open_checkpoint
from onellm_dist.convert.towers import is_tower, open_tower
from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig

UPM_HEAD_WIDTH = 64
"""Channels of a head of a new UPM."""


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
    additions: Additions | None = None,
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
        additions: what `base` gets.
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
    additions = additions or Additions()
    _check_parts(llm, encoder, base, additions)
    if base is not None:
        opened = extend_model(_open_part(base, "onellm", options), additions, seed)
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
    llm: Path | None, encoder: Path | str | None, base: Path | None, additions: Additions
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
    if additions.experts or additions.modalities:
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
    check_modalities(modalities or ())
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
        {**llm.checksums, **encoder.checksums},
        (*llm.archives, *encoder.archives),
        llm.generation,
    )
