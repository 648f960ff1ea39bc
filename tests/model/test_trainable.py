"""Whether anything trains: in the module, in its children, in nothing."""

from __future__ import annotations

import torch
from torch import nn

from onellm_dist.model.trainable import has_trainable


def test_a_single_parameter_anywhere_is_found() -> None:
    inner = nn.Sequential(nn.ReLU(), nn.LayerNorm(2))
    model = nn.Sequential(nn.Linear(2, 2, bias=False), inner)
    assert has_trainable(model)
    model.requires_grad_(False)
    assert not has_trainable(model)
    for parameter in model.parameters():
        parameter.requires_grad_()
        assert has_trainable(model)
        parameter.requires_grad_(False)
    model.requires_grad_(False).register_parameter("own", nn.Parameter(torch.ones(2)))
    assert has_trainable(model)


def test_modules_without_parameters_do_not_train() -> None:
    empty = nn.Module()
    empty.register_parameter("missing", None)
    empty.register_module("gone", None)
    assert not has_trainable(empty) and not has_trainable(nn.Sequential(nn.Identity(), empty))
