"""What trains in a stage, what is frozen, and which weights decay (paper, section 3.3; the reference froze nothing)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from onellm_dist.common.errors import UsageError

ALIGN_ROOTS = ("tokenizers", "projectors", "upm")
"""Trained in `align`: the modality tokenizers, the per-modality projections, queries, router and tags, and the experts."""
TUNE_ROOTS = ("llm",)


def freeze_for_stage(
    model: nn.Module, stage: str, modalities: Collection[str], *, encoder: bool = False
) -> None:
    """Set requires_grad of every parameter for `stage`.

    In `align`, the parts of modalities that the mixture does not have stay frozen: they cannot learn, would only decay,
    and their optimizer state is large (fMRI's tokenizer alone has 129 M weights).

    Args:
        model: has `tokenizers`, `projectors` (one child a modality), `upm`, `encoder` and `llm`.
        stage: `align` or `tune`.
        modalities: those of the mixture.
        encoder: it trains in `align` too (all of it but CLIP's final projection, which nothing computes with).

    Raises:
        UsageError: nothing would train.
    """
    roots = ALIGN_ROOTS if stage == "align" else TUNE_ROOTS
    if stage == "align" and encoder:
        roots = (*roots, "encoder")
    known = set(model.get_submodule("projectors")._modules)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        owner = parts[1] if parts[0] in ("tokenizers", "projectors") and parts[1] in known else None
        unused = parts[:2] == ["encoder", "proj"]
        parameter.requires_grad_(
            parts[0] in roots and (owner is None or owner in modalities) and not unused
        )
    if not modalities and stage == "align":
        raise UsageError(
            "no dataset of the mixture has a modality",
            "in the stage align nothing could train on text alone.",
            "give data.mixture a dataset with a modality, or train.stage=tune.",
        )


def parts_of(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the part whose gradient norm is told: a modality for its tokenizer and projector, else `upm`, `llm`, `encoder`."""
    found = {}
    for name, _ in model.named_parameters():
        root, owner, *_ = name.split(".")
        found[name] = owner if root in ("tokenizers", "projectors") else root
    return found


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trainable parameters as two groups: with decay, and without (biases and RMSNorm weights, as the reference does).

    LayerNorm weights, tags, queries and learned positions decay, as in the reference.
    """
    exempt = {id(p) for p in _without_decay(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _without_decay(model: nn.Module) -> Iterable[nn.Parameter]:
    for module in model.modules():
        # There is an RMSNorm class a model family (LlamaRMSNorm, ..., our UPMNorm); they have no bias, LayerNorms do.
        own = dict(module.named_parameters(recurse=False))
        rms = (
            "norm" in type(module).__name__.lower()
            and list(own) == ["weight"]
            and not isinstance(module, nn.LayerNorm)
        )
        for name, parameter in own.items():
            if name == "bias" or name.endswith("_bias") or rms:
                yield parameter


def copies_of(model: nn.Module, source: str, modalities: Iterable[str]) -> dict[str, str]:
    """Which parameters start as copies: `modalities` take `source`'s projections, queries, router and tags (paper, section 3.3).

    Returns:
        Name of a parameter -> name of the one whose values it takes.

    Raises:
        UsageError: the model does not have one of them.
    """
    projectors: Any = model.get_submodule("projectors")
    given = dict(projectors.named_children())
    copies: dict[str, str] = {}
    for name in modalities:
        if name not in given or source not in given:
            raise UsageError(
                f"model.init_from_image: the model has no modality {name if name not in given else source}",
                "there is nothing to copy.",
                f"name some of: {', '.join(given)}.",
            )
        copies |= {
            f"projectors.{name}.{key}": f"projectors.{source}.{key}"
            for key, _ in given[source].named_parameters()
        }
    return copies
