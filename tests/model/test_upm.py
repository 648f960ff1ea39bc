"""The UPM: experts, routers, and the last block that computes the query rows alone."""

from __future__ import annotations

import pytest
import torch
from packs import relative, small_model

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
        whole = []
        for expert in upm.experts:
            y = x
            for block in expert.blocks:
                y = block(y, SequenceLengths.from_lengths(lengths, device=x.device))
            whole.append(torch.cat([part[:30] for part in y.split(lengths)]))
        reference = sum(router_weights[:, k : k + 1] * y for k, y in enumerate(whole))
    assert relative(ours, reference) < 1e-6


def gates_of(router: str) -> torch.Tensor:
    model = small_model(router=router)
    return model.get_projector("image").router(model.get_projector("image").queries()).detach()


def test_soft_gates_sum_to_one_and_differ_between_tokens() -> None:
    router_weights = gates_of("soft")
    assert torch.allclose(router_weights.sum(1), torch.ones(30))
    assert router_weights.std(0).min() > 0


def test_constant_gates_are_equal_and_have_no_parameters() -> None:
    assert torch.equal(gates_of("constant"), torch.full((30, 3), 1 / 3))
    assert not [
        name for name, _ in small_model(router="constant").named_parameters() if ".router." in name
    ]


def test_sparse_gates_keep_the_largest_soft_gate() -> None:
    soft, sparse = gates_of("soft"), gates_of("sparse")
    assert ((sparse > 0).sum(1) == 1).all()
    assert torch.equal(sparse.amax(1), soft.amax(1))
    assert torch.equal(sparse.argmax(1), soft.argmax(1))


def test_copied_experts_start_equal_and_separate_ones_do_not() -> None:
    for init, same in (("copied", True), ("separate", False)):
        first, second, _ = small_model(init=init).upm.experts
        assert (
            torch.equal(first.blocks[0].attention.q.weight, second.blocks[0].attention.q.weight)
            is same
        )


@pytest.mark.parametrize(("key", "value"), [("router", "softmax"), ("init", "clone")])
def test_unknown_forms_are_refused(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"upm.{key}='{value}'"):
        OneLLMUPMConfig(**{key: value})
