"""The parts of a model by their parameters, and parameters that start as copies of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.model.spans.positions import SPAN_ROWS


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


def find_copies(model: nn.Module, source: str, modalities: Iterable[str]) -> dict[str, str]:
    """Find the parameters that start as copies of another modality's (paper, section 3.3).

    Learned span positions do not: which tile a span of a picture is says nothing of a sound's.

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
            if not f".{key}".endswith(SPAN_ROWS)
        }
    return copies
