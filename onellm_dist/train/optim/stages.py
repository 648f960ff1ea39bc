"""What trains in a stage, what is frozen, and which weights decay (paper, section 3.3).

The reference implementation froze nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from onellm_dist.common.errors import UsageError

ALIGN_ROOTS = ("tokenizers", "projectors", "upm")
"""Trained in `align`: the modality tokenizers; the per-modality projections, queries, router and
tags; and the experts."""
TUNE_ROOTS = ("llm",)
"""Trained in `tune`."""


def freeze_for_stage(
    model: nn.Module, stage: str, modalities: Collection[str], *, encoder: bool = False
) -> None:
    """Set requires_grad of every parameter for a stage.

    In `align`, the parts of modalities that the mixture does not have stay frozen. They cannot
    learn, would only decay, and their optimizer state is large (fMRI's tokenizer alone has 129 M
    weights).

    Args:
        model: has `tokenizers`, `projectors` (one child per modality), `upm`, `encoder` and `llm`.
        stage: `align` or `tune`.
        modalities: those of the mixture.
        encoder: whether the encoder trains in `align` too (all of it but CLIP's final projection,
            which nothing computes with).

    Raises:
        UsageError: nothing would train.
    """
    roots = ALIGN_ROOTS if stage == "align" else TUNE_ROOTS
    if stage == "align" and encoder:
        roots = (*roots, "encoder")
    known = set(model.get_submodule("projectors")._modules)
    for name, parameter in model.named_parameters():
        path = name.split(".")
        owner = path[1] if path[0] in ("tokenizers", "projectors") and path[1] in known else None
        is_unused = path[:2] == ["encoder", "proj"]
        parameter.requires_grad_(
            path[0] in roots and (owner is None or owner in modalities) and not is_unused
        )
    if not modalities and stage == "align":
        raise UsageError(
            "no dataset of the mixture has a modality",
            "in the stage align nothing could train on text alone.",
            "add a dataset with a modality to data.mixture, or set train.stage=tune.",
        )


def map_parts(model: nn.Module) -> dict[str, str]:
    """Assign every parameter to the part of the model whose gradient norm is recorded.

    Returns:
        Parameter name to part: a modality for its tokenizer and projector; otherwise `upm`, `llm`
        or `encoder`.
    """
    found = {}
    for name, _ in model.named_parameters():
        root, owner, *_ = name.split(".")
        found[name] = owner if root in ("tokenizers", "projectors") else root
    return found


def build_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into two groups, with and without weight decay.

    Biases and RMSNorm weights do not decay. LayerNorm weights, tags, queries and learned positions
    do, as in the reference implementation.
    """
    exempt = {id(p) for p in _list_exempt(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _list_exempt(model: nn.Module) -> Iterable[nn.Parameter]:
    """Yield the parameters that do not decay."""
    for module in model.modules():
        # Each model family has its own RMSNorm class (LlamaRMSNorm, ..., our UPMNorm). They have no
        # bias, and LayerNorms do.
        own = dict(module.named_parameters(recurse=False))
        is_rms_norm = (
            "norm" in type(module).__name__.lower()
            and list(own) == ["weight"]
            and not isinstance(module, nn.LayerNorm)
        )
        for name, parameter in own.items():
            if name == "bias" or name.endswith("_bias") or is_rms_norm:
                yield parameter


def find_copies(model: nn.Module, source: str, modalities: Iterable[str]) -> dict[str, str]:
    """Find the parameters that start as copies of another modality's (paper, section 3.3).

    Args:
        model: has `projectors`, one child per modality.
        source: the modality whose projections, queries, router and tags are copied.
        modalities: those that take the copies.

    Returns:
        Name of a parameter to the name of the parameter whose values it takes.

    Raises:
        UsageError: the model does not have one of the modalities.
    """
    projectors: Any = model.get_submodule("projectors")
    known = dict(projectors.named_children())
    copies: dict[str, str] = {}
    for name in modalities:
        if name not in known or source not in known:
            missing = name if name not in known else source
            raise UsageError(
                f"model.init_from_image: the model has no modality {missing}",
                "there is nothing to copy.",
                f"name some of: {', '.join(known)}.",
            )
        copies |= {
            f"projectors.{name}.{key}": f"projectors.{source}.{key}"
            for key, _ in known[source].named_parameters()
        }
    return copies
