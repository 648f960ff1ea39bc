"""Comparing two answers by a model and its reference (DPO, arXiv 2305.18290).

The reference runs within the same forward, before the model and without gradients: so engines
gather its weights as they gather all others, and nothing of it is kept for backward. It is the
model without its adapters, or frozen copies of the parts that train, which are modules of the
model (`reference.llm`) and start as it does. Media are encoded once where the reference would
encode them alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.config.train_sections import DPO, DpoSection
from onellm_dist.model.adapters.lora import PATTERN as ADAPTER_PATTERN
from onellm_dist.model.losses.registry import get_pair_loss
from onellm_dist.model.sequence_lengths import to_device_tensor
from onellm_dist.packed import PackedBatch, PackedOutput

REFERENCE = "reference"
"""The model's child that holds the copies."""
PREFIX = f"{REFERENCE}."


@dataclass(frozen=True)
class PreferenceLoss:
    """How the two answers of a pair are compared.

    Attributes:
        section: the `train.dpo` section.
        adapted: the layers with adapters, which the reference leaves out.
        shares_media: whether the reference encodes media as the model does.
    """

    section: DpoSection
    adapted: Sequence[Any]
    shares_media: bool

    def compute(self, model: Any, batch: PackedBatch) -> PackedOutput:
        """Compute the loss of each pair of a pack.

        Args:
            model: a OneLLM.
            batch: a pack of n pairs.
        """
        encoded = model.encode_packed(batch) if self.shares_media else None
        with torch.no_grad(), leave_out(self.adapted):
            reference, _ = _score(build_reference(model), batch, encoded)
        scores, router_weights = _score(model, batch, encoded)
        rewards = self.section.beta * (scores - reference)
        losses = get_pair_loss(DPO)(rewards[:, 0] - rewards[:, 1], self.section.label_smoothing)
        return PackedOutput(
            loss=(losses * batch.weights.to(losses)).sum(),
            nll=losses.detach(),
            sample_index=torch.arange(len(losses), device=losses.device),
            router_weights={name: w.detach().float() for name, w in router_weights.items()},
            rewards=rewards.detach(),
        )


def prepare_preference(model: Any, section: DpoSection) -> None:
    """Let a model compare answers, and give it the copies that it needs.

    Args:
        model: a OneLLM with its adapters, of which everything is frozen that does not train.
        section: the `train.dpo` section.

    Raises:
        UsageError: the reference is the model without its adapters, and more than these trains.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = {name.split(".")[0] for name in trained}
    if section.reference == "copy":
        model.reference = nn.ModuleDict(
            {name: copy.deepcopy(model.get_submodule(name)) for name in sorted(parts)}
        ).requires_grad_(False)
    elif others := [name for name in trained if not fnmatchcase(name, ADAPTER_PATTERN)]:
        raise UsageError(
            f"train.dpo.reference=adapter, and {len(others)} weights train that are not adapters: "
            f"{', '.join(others[:3])}",
            "the model without its adapters would move with them, and is no longer a reference.",
            "let adapters alone train (train.stage=tune), or remove train.lora and set "
            "train.dpo.reference=copy.",
        )
    adapted = [] if section.reference == "copy" else _list_adapted(model)
    model.preference = PreferenceLoss(section, adapted, shares_media=parts <= {"llm"})


def list_copies(model: nn.Module) -> dict[str, str]:
    """Name of each parameter of the reference's copies to that of the parameter it starts as."""
    return {
        name: name.removeprefix(PREFIX)
        for name, _ in model.named_parameters()
        if name.startswith(PREFIX)
    }


def build_reference(model: Any) -> Any:
    """The model with its copies in place of the parts that train; all else is shared."""
    copies = model._modules.get(REFERENCE)
    if copies is None:
        return model
    view = copy.copy(model)
    view._modules = {**model._modules, **dict(copies.items())}
    return view


def list_llms(model: Any) -> list[Any]:
    """The LLM of a model, and its copy if there is one."""
    copies = model._modules.get(REFERENCE)
    return [model.llm, *([copies["llm"]] if copies is not None and "llm" in copies else [])]


@contextmanager
def leave_out(adapted: Sequence[Any]) -> Iterator[None]:
    """Compute layers without their adapters meanwhile.

    PEFT's own switch also freezes the adapters, for good (0.21: `enable_adapters`).
    """
    for layer in adapted:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in adapted:
            layer._disable_adapters = False


def _list_adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


def _score(
    model: Any, batch: PackedBatch, encoded: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[n, 2] log-probability of the chosen and of the rejected answer of each pair; the routers.

    Sums are over rows of a mask: an `index_add` on a GPU adds in any order.
    """
    logits, supervised, router_weights = model.compute_packed_logits(batch, encoded)
    nll = model.token_loss(logits, batch.labels.index_select(0, supervised))
    answers = to_device_tensor(_number_answers(batch), nll.device).index_select(0, supervised)
    rows = torch.arange(2 * len(batch.text_token_counts), device=nll.device)
    sums = torch.where(answers == rows[:, None], nll, 0.0).sum(1)
    return -sums.reshape(-1, 2), router_weights


def _number_answers(batch: PackedBatch) -> np.ndarray:
    """[T_text] number of the answer that each text token belongs to: 2i, 2i + 1 in sample i."""
    counts = np.asarray(batch.text_token_counts)
    chosen = np.asarray(batch.chosen_tokens or np.zeros_like(counts))
    sizes = np.stack([chosen, counts - chosen], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * len(counts)), sizes)
