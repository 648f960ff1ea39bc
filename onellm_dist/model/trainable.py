"""Whether anything in a part of the model trains."""

from __future__ import annotations

from torch import nn


def has_trainable(module: nn.Module) -> bool:
    """Whether any parameter of a module or its children requires a gradient.

    torch's `parameters()` takes ten times as long to find none, which every micro-batch would pay.
    """
    waiting = [module]
    while waiting:
        own = waiting.pop()
        if any(p is not None and p.requires_grad for p in own._parameters.values()):
            return True
        waiting += [child for child in own._modules.values() if child is not None]
    return False
