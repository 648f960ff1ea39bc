"""Activation checkpointing: equal gradients to the bit; what is kept, what is computed twice."""

from __future__ import annotations

import gc

import pytest
import torch
from packs import make_pack
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from onellm_dist.model import load_model
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.recompute import MODES, enable_activation_checkpointing


def measure(mode: str) -> tuple[dict[str, torch.Tensor], int, int]:
    """(gradients, bytes kept between forward and backward, FLOPs of both)."""
    model: OneLLMForConditionalGeneration = load_model(path=None, preset="toy", seed=1)[0]
    model.train()
    enable_activation_checkpointing(model, mode)
    pack = make_pack([("image",), ("image",), ("imu",)], [40, 50, 60])
    # What torch's allocator gives out and takes back, by its own count: malloc's moves with the
    # garbage of earlier tests, which Python may collect at any moment.
    gc.collect()
    with FlopCounterMode(display=False) as counter:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = model(packed=pack).loss
        loss.backward()
    kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, kept, counter.get_total_flops()


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[dict[str, torch.Tensor], int, int]]:
    measure("none")  # what the first pass alone allocates
    return {mode: measure(mode) for mode in MODES}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.seconds
def test_gradients_are_the_same_to_the_bit(
    found: dict[str, tuple[dict[str, torch.Tensor], int, int]], mode: str
) -> None:
    plain, other = found["none"][0], found[mode][0]
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[n], other[n]) for n in plain)


def test_selective_keeps_less_and_computes_no_more_products(
    found: dict[str, tuple[dict[str, torch.Tensor], int, int]],
) -> None:
    kept = {mode: found[mode][1] for mode in MODES}
    flops = {mode: found[mode][2] for mode in MODES}
    assert kept["full"] < 0.5 * kept["selective"] and kept["selective"] < 0.7 * kept["none"], kept
    assert flops["selective"] < 1.01 * flops["none"] and flops["full"] > 1.2 * flops["none"], flops
