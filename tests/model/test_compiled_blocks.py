"""Blocks that inductor compiles: the same numbers, and no new graph for new packs."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from packs import empty_pack, make_pack, relative, small_model
from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.model.compiled_blocks import GRAPHS_OF_ONE_CODE, compile_blocks
from onellm_dist.packed import PackedBatch

NAMES = ("image", "imu", "fmri")
PACKS, WARMED_UP, MOST_GRAPHS = 50, 12, 48
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


def check_loss(given: torch.Tensor, wanted: torch.Tensor) -> None:
    difference, size = (float(x.detach()) for x in (given - wanted, wanted))
    assert abs(difference) <= BOUND * max(1.0, abs(size))


def check_step(compiled: Any, plain: Any, pack: PackedBatch) -> None:
    """Loss and gradients are those of the plain model."""
    for model in (plain, compiled):
        model.zero_grad()
    wanted, given = plain(packed=pack).loss, compiled(packed=pack).loss
    check_loss(given, wanted)
    wanted.backward()
    given.backward()
    for (name, one), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None and other.grad.abs().max() > 1e-12:
            assert relative(one.grad, other.grad) < 10 * BOUND, name


@pytest.mark.soak
def test_new_packs_compile_nothing_new_and_give_the_same_numbers() -> None:
    from torch._dynamo.utils import counters

    plain, compiled = small_model(modalities=NAMES), small_model(modalities=NAMES)
    torch._dynamo.reset()
    found = compile_blocks(compiled, "cpu")
    assert found == {"EncoderBlock": 2, "UPMBlock": 6, "LlamaDecoderLayer": 2}
    counters.clear()
    graphs = []
    for pack in draw_packs():
        check_step(compiled, plain, pack)
        graphs.append(counters["stats"]["unique_graphs"])

    assert 0 < graphs[-1] <= MOST_GRAPHS
    assert graphs[-1] == graphs[WARMED_UP], "a later pack was compiled again"


class _Block(nn.Module):
    def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return x + len(kind)


class _Stack(nn.Module):
    _no_split_modules = ("_Block",)

    def __init__(self) -> None:
        super().__init__()
        self.block = _Block()


@pytest.mark.seconds
def test_a_piece_has_more_graphs_than_torchs_limit_in_every_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU autograd recomputes blocks in a thread of its own, which may have torch's settings.

    They are traced, and not compiled; each kind is a graph.
    """
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    kinds = [letter * count for count, letter in enumerate("abcdefghijkl", start=1)]
    torch._dynamo.reset()
    stack, x = _Stack(), torch.ones(2, 3)
    limit = 8  # torch's own
    assert len(kinds) > limit

    def run() -> list[float]:
        assert config.recompile_limit in (limit, GRAPHS_OF_ONE_CODE)
        with config.patch(fail_on_recompile_limit_hit=True):
            return [float(stack.block(x, kind)[0, 0]) for kind in kinds]

    with config.patch(recompile_limit=limit):  # other tests may have raised it
        assert compile_blocks(stack, "cpu") == {"_Block": 1}
        counters.clear()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(run).result() == [1.0 + len(kind) for kind in kinds]
    assert counters["stats"]["unique_graphs"] == len(kinds)


def test_a_machine_that_cannot_compile_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has a compiler for processors; the meta device stands for a GPU without Triton."""
    from torch._dynamo import config

    def compile_for_processors(_: object, **__: object) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            if x.is_meta:
                raise RuntimeError("no Triton")
            return x + 1

        return run

    monkeypatch.setattr(torch, "compile", compile_for_processors)
    with config.patch(recompile_limit=8):
        assert compile_blocks(small_model(modalities=("imu",)), "cpu")
        assert config.recompile_limit == GRAPHS_OF_ONE_CODE > 8
    with pytest.raises(UsageError, match=r"train\.compile=blocks.* on meta: .*no Triton"):
        compile_blocks(small_model(modalities=("imu",)), "meta")


def test_a_compiler_that_is_switched_off_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UsageError, match=r"train\.compile=blocks.* is switched off"):
        compile_blocks(small_model(modalities=("imu",)), "cpu")
