"""The UPM: experts, routers, and the last block that computes the query rows alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from packs import relative, small_model
from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.model.configuration import OneLLMUPMConfig
from onellm_dist.model.sequence_lengths import SequenceLengths


def test_the_last_block_loses_nothing() -> None:
    upm = small_model().upm
    lengths = (41, 60, 41)
    x = torch.randn(sum(lengths), 32)
    router_weights = torch.rand(3 * 30, 3)
    with torch.no_grad():
        ours = upm(x, router_weights, lengths, 30)
        complete = []
        for expert in upm.experts:
            y, blocks = x, cast(nn.ModuleList, expert.blocks)
            for block in blocks:
                y = block(y, SequenceLengths.from_lengths(lengths, device=x.device))
            complete.append(torch.cat([part[:30] for part in y.split(lengths)]))
        weighted = [router_weights[:, k : k + 1] * y for k, y in enumerate(complete)]
        reference = torch.stack(weighted).sum(0)
    assert relative(ours, reference) < 1e-6


def compute_router_weights(router: str) -> torch.Tensor:
    projector = small_model(router=router).get_projector("image")
    weights: torch.Tensor = projector.router(projector.queries())
    return weights.detach()


def test_soft_weights_sum_to_one_and_differ_between_tokens() -> None:
    weights = compute_router_weights("soft")
    assert torch.allclose(weights.sum(1), torch.ones(30))
    assert weights.std(0).min() > 0


def test_constant_weights_are_equal_and_have_no_parameters() -> None:
    assert torch.equal(compute_router_weights("constant"), torch.full((30, 3), 1 / 3))
    assert not [
        name for name, _ in small_model(router="constant").named_parameters() if ".router." in name
    ]


def test_sparse_weights_keep_the_largest_soft_weight() -> None:
    soft, sparse = compute_router_weights("soft"), compute_router_weights("sparse")
    assert ((sparse > 0).sum(1) == 1).all()
    assert torch.equal(sparse.amax(1), soft.amax(1))
    assert torch.equal(sparse.argmax(1), soft.argmax(1))


def test_copied_experts_start_equal_and_separate_ones_do_not() -> None:
    for init, same in (("copied", True), ("separate", False)):
        state = small_model(init=init).state_dict()
        first, second = (state[f"upm.experts.{k}.blocks.0.attention.q.weight"] for k in (0, 1))
        assert torch.equal(first, second) is same


@pytest.mark.parametrize(("key", "value"), [("router", "softmax"), ("init", "clone")])
def test_unknown_forms_are_refused(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"upm.{key}='{value}'"):
        OneLLMUPMConfig(**cast(dict[str, Any], {key: value}))
