"""What the matrix trains: stages, rules, adapters and optimizers, and plain torch's twins."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from matrix_model import MODALITIES

from onellm_dist.config.train_sections import LoraSection, OptimSection, ParameterRule, TrainSection
from onellm_dist.model.adapters.lora import add_adapters
from onellm_dist.train.optim.groups import ParameterGroup, build_parameter_groups
from onellm_dist.train.optim.rules import prepare_parameters

LR, DECAY, BETAS, EPS = 2e-3, 0.1, (0.9, 0.95), 1e-8
RULES = (
    ParameterRule(match="llm.*", lr=LR / 2, layer_decay=0.7),
    ParameterRule(match="upm.*", lr=LR / 4, weight_decay=0.3),
    ParameterRule(match="*embed_tokens*", freeze=True),
)
"""Seven groups of their own rates or decay."""
EVERYWHERE = ("llm.*", "encoder.*", "upm.*")
STAGES: dict[str, dict[str, Any]] = {
    "align": {"stage": "align"},
    "tune": {"stage": "tune"},
    "encoder": {"stage": "align", "encoder": "trainable"},
    "both": {"stage": "joint"},
    "joint": {"stage": "joint", "parameters": RULES},
    "lora": {"stage": "joint", "lora": LoraSection(rank=4, alpha=8.0, targets=EVERYWHERE)},
    "adapters": {"stage": "tune", "lora": LoraSection(rank=4, alpha=8.0, targets=EVERYWHERE)},
    "lora_llm": {
        "stage": "tune",
        "lora": LoraSection(rank=4, alpha=8.0, targets=("llm.*",)),
        "parameters": (ParameterRule(match="*.lora_B.*", lr=4 * LR),),
    },
    "dora": {
        "stage": "tune",
        "lora": LoraSection(rank=4, alpha=8.0, rslora=True, dora=True, targets=EVERYWHERE),
        "parameters": (ParameterRule(match="*.lora_B.*", lr=2 * LR),),
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": LR, "betas": BETAS, "eps": EPS},
    "sgd": {"lr": 0.05, "name": "sgd", "options": {"momentum": 0.9}},
    "lion": {"lr": 1e-3, "name": "lion", "options": {"betas": [0.9, 0.99]}},
}


class Variant(NamedTuple):
    """A model that is prepared, and how its groups train."""

    groups: list[ParameterGroup]
    optim: OptimSection

    @property
    def torch_groups(self) -> list[dict[str, Any]]:
        return [group.to_torch() for group in self.groups]

    @property
    def rates(self) -> list[float]:
        return [self.optim.lr * group.rate.scale for group in self.groups]


def prepare(model: Any, stage: str, optimizer: str) -> Variant:
    """Add adapters and freeze what does not train."""
    train = TrainSection(steps=1, **STAGES[stage])
    optim = OptimSection(schedule="constant", weight_decay=DECAY, **OPTIMIZERS[optimizer])
    if train.lora is not None:
        add_adapters(model, train.lora)
    plan = prepare_parameters(model, train, optim, MODALITIES)
    return Variant(build_parameter_groups(model, plan.rates), optim)


def make_plain_optimizer(variant: Variant) -> torch.optim.Optimizer:
    """An optimizer of plain torch, with a rate for each group."""
    groups = [
        {**group, "lr": lr} for group, lr in zip(variant.torch_groups, variant.rates, strict=True)
    ]
    if variant.optim.name == "sgd":
        return torch.optim.SGD(groups, **variant.optim.options)
    if variant.optim.name == "lion":
        return PlainLion(groups, {})
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS)


class PlainLion(torch.optim.Optimizer):
    """Lion as its paper writes it (arXiv 2302.06675, algorithm 2), element by element."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = 0.9 * m + (1 - 0.9) * p.grad
                p.copy_(p - group["lr"] * (torch.sign(c) + group["weight_decay"] * p))
                m.copy_(0.99 * m + (1 - 0.99) * p.grad)


def absent_gradients(trained: Any) -> None:
    """Give what a step does not reach a gradient of zero, as every engine does."""
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
