"""Blocks that inductor compiles: the same numbers, and no new graph for new packs."""

from __future__ import annotations

import random

import pytest
import torch
from packs import empty_pack, make_pack, relative, small_model

from onellm_dist.common.errors import UsageError
from onellm_dist.model.compiled_blocks import compile_blocks
from onellm_dist.packed import PackedBatch

PACKS, SETTLED, MOST_GRAPHS = 50, 12, 48
"""New shapes; after how many nothing is compiled; graphs in all. Of those, 42 were seen: parts of
three kinds of blocks, with and without gradients of their inputs, and for empty packs."""
BOUND = 1e-6
"""Relative, in fp32: loss, and gradients over the largest of their tensor (ten times that)."""


def draw_packs() -> list[PackedBatch]:
    """Packs of 1 to 9 samples, of any modalities and lengths; one of them is empty."""
    rng = random.Random(0)
    packs = []
    for seed in range(PACKS):
        count = rng.randint(1, 9)
        spans = [rng.choice([(), ("image",), ("imu",), ("fmri", "imu")]) for _ in range(count)]
        packs.append(make_pack(spans, [rng.randint(2, 40) for _ in spans], seed))
    packs[3] = empty_pack()
    return packs


@pytest.mark.soak
def test_new_packs_compile_nothing_new_and_give_the_same_numbers() -> None:
    from torch._dynamo.utils import counters

    names = ("image", "imu", "fmri")
    plain, compiled = small_model(modalities=names), small_model(modalities=names)
    torch._dynamo.reset()
    found = compile_blocks(compiled)
    assert found == {"EncoderBlock": 2, "UPMBlock": 6, "LlamaDecoderLayer": 2}
    counters.clear()
    graphs = []
    for pack in draw_packs():
        for model in (plain, compiled):
            model.zero_grad()
        wanted, given = plain(packed=pack).loss, compiled(packed=pack).loss
        difference, size = (float(x.detach()) for x in (given - wanted, wanted))
        assert abs(difference) <= BOUND * max(1.0, abs(size))
        wanted.backward()
        given.backward()
        for (name, one), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None and other.grad is not None and other.grad.abs().max() > 1e-12:
                assert relative(one.grad, other.grad) < 10 * BOUND, name
        graphs.append(counters["stats"]["unique_graphs"])

    assert 0 < graphs[-1] <= MOST_GRAPHS
    assert graphs[-1] == graphs[SETTLED], "a later pack was compiled again"


def test_a_machine_that_cannot_compile_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fail)
    model = small_model(modalities=("imu",))
    with pytest.raises(UsageError, match=r"train\.compile=blocks.*no C\+\+ compiler"):
        compile_blocks(model)
