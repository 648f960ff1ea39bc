"""Losses of supervised tokens and of pairs of answers, found by name: `train.loss` picks one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from onellm_dist.common.errors import UsageError
from onellm_dist.common.plugins import import_user_module

TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [N, V], targets [N] int64) -> [N] fp32 loss of each supervised token."""
PairLoss = Callable[[torch.Tensor, float], torch.Tensor]
"""(rewards of the chosen answers less those of the rejected ones [n], label smoothing) -> [n] fp32
loss of each pair."""
DEFAULT_LOSS = "cross_entropy"
_LOSSES: dict[str, TokenLoss] = {}
_PAIR_LOSSES: dict[str, PairLoss] = {}


def register_loss(name: str) -> Callable[[TokenLoss], TokenLoss]:
    """Decorator: make a loss available under `name`.

    Raises:
        ValueError: another loss has this name.
    """

    def register(function: TokenLoss) -> TokenLoss:
        if name in list_losses():
            raise ValueError(f"loss {name!r} is registered already")
        _LOSSES[name] = function
        return function

    return register


def register_pair_loss(name: str) -> Callable[[PairLoss], PairLoss]:
    """Decorator: make a loss of pairs of answers available under `name`.

    Raises:
        ValueError: another loss has this name.
    """

    def register(function: PairLoss) -> PairLoss:
        if name in list_losses():
            raise ValueError(f"loss {name!r} is registered already")
        _PAIR_LOSSES[name] = function
        return function

    return register


def get_pair_loss(name: str) -> PairLoss:
    """The loss of pairs of answers of a registered name.

    Raises:
        KeyError: there is none.
    """
    return _PAIR_LOSSES[name]


def get_loss(name: str) -> TokenLoss:
    """The loss of a registered name, or the function that `module:function` names.

    Raises:
        UsageError: no loss is registered under `name`, or the module or function does not exist.
    """
    if name in _LOSSES:
        return _LOSSES[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(
            f"unknown loss {name!r}",
            "nothing can be trained without a loss.",
            f"use one of: {', '.join(list_losses())}; or module:function.",
        )
    try:
        loss: TokenLoss = getattr(import_user_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"loss {name!r} cannot be imported: {error}",
            "nothing can be trained without a loss.",
            "check the module's path (PYTHONPATH) and the function's name.",
        ) from error
    return loss


def list_losses() -> list[str]:
    """Names of all registered losses, sorted."""
    return sorted([*_LOSSES, *_PAIR_LOSSES])


@register_loss(DEFAULT_LOSS)
def compute_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in fp32: logits [N, V], targets [N] -> [N]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


@register_pair_loss("dpo")
def compute_dpo(margins: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Direct preference optimization (arXiv 2305.18290, equation 7): margins [n] -> [n].

    With label smoothing: the mean over answers that are swapped with that probability (conservative
    DPO, as in TRL).
    """
    right = F.logsigmoid(margins) * (1 - label_smoothing)
    return -right - F.logsigmoid(-margins) * label_smoothing
