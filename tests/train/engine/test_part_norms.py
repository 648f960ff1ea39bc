"""Norms of the gradient by part do not depend on how many ranges are looked at together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from onellm_dist.train.engine import grad_norms as parts
from onellm_dist.train.engine.base import LocalRange


class Whole(LocalRange):
    """A parameter that this rank has all of."""

    def __init__(self, name: str, values: torch.Tensor) -> None:
        self.name, self.shape, self.start, self.length, self._values = (
            name,
            tuple(values.shape),
            0,
            values.numel(),
            values,
        )

    def read(self, key: str) -> torch.Tensor:
        raise NotImplementedError(key)

    def write(self, key: str, values: torch.Tensor) -> None:
        raise NotImplementedError(key)

    def gradient(self) -> torch.Tensor:
        return self._values.flatten()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("at_once", [1, 7, 40, 10**6])
def test_parts_are_right_whatever_is_looked_at_together(
    alone: None, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(parts, "ELEMENTS_AT_ONCE", at_once)
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(5, 2), "c": nn.Linear(2, 2)})
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    part_of = {name: name[0] for name in gradients if not name.startswith("c")}
    norms = parts.PartNorms(
        model, [Whole(n, g) for n, g in gradients.items()], part_of, torch.device("cpu")
    )
    found = norms.read()
    for part in "ab":
        want = torch.cat([g.flatten() for n, g in gradients.items() if n[0] == part]).norm()
        assert found.by_part[part] == pytest.approx(float(want), rel=1e-6)
    assert found.total == pytest.approx(
        sum(float(g.square().sum()) for g in gradients.values()) ** 0.5, rel=1e-6
    )
