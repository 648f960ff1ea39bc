"""No dropout in an LLM that does not train.

In stage `align` the LLM is frozen but runs in training mode, which recomputation needs. The dropout
of its config (0.1 in GPT-2 and OPT) would then add noise to every gradient needlessly.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from onellm_dist.model.trainable import has_trainable

_RATES = re.compile(r"\w*dropout\w*|\w+_pdrop|\w*dropout_p(rob)?")
_KEPT = "_onellm_dropout"
"""Attribute of a silenced module that keeps its rates."""


def update_dropout(llm: Any, *, silent: bool = False) -> None:
    """Silence the dropout of an LLM that is completely frozen; restore it if parts train.

    It is cheap where nothing has changed since the last call.

    Args:
        llm: the LLM.
        silent: silence it although parts train: answers are compared with those of a reference,
            and noise in one of the two would look like a preference (TRL does so by default).
    """
    frozen = silent or not has_trainable(llm)
    if getattr(llm, "_onellm_frozen", False) == frozen:
        return
    llm._onellm_frozen = frozen
    for module in llm.modules():
        if frozen:
            _silence(module)
        else:
            _restore(module)


def _silence(module: nn.Module) -> None:
    rates = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, float) and value and _RATES.fullmatch(name)
    }
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
        rates["p"] = module.p
    if rates:
        setattr(module, _KEPT, rates)
        for name in rates:
            setattr(module, name, 0.0)


def _restore(module: nn.Module) -> None:
    for name, value in vars(module).pop(_KEPT, {}).items():
        setattr(module, name, value)
