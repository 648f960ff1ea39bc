"""The kernel that really ran, as the profiler saw it."""

from __future__ import annotations

import pytest
import torch
from packs import small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from onellm_dist.diagnostics.software_checks import check_attention, check_kernels
from onellm_dist.model.kernel_trace import PRODUCTS, find_innermost, record, trace_attention
from onellm_dist.model.model_kernels import KernelChoice
from onellm_dist.train.start.kernel_record import record_kernels

CPU = torch.device("cpu")
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def trace(causal: bool = False) -> str:
    return trace_attention(CPU, dtype=torch.float32, head_width=16, causal=causal).operation


@pytest.mark.parametrize("causal", [False, True])
def test_the_operation_is_the_one_that_a_library_was_made_to_run(causal: bool) -> None:
    assert trace(causal) == FLASH
    with sdpa_kernel(SDPBackend.MATH):
        assert trace(causal) == PRODUCTS


def test_a_profile_has_the_innermost_operation() -> None:
    """As on a GPU, where operations of other libraries choose below torch's."""
    q = torch.ones(1, 2, 8, 16)

    def run() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert find_innermost(record(run, on_gpu=False)) == FLASH
    with sdpa_kernel(SDPBackend.MATH):
        found = find_innermost(record(run, on_gpu=False))
    assert found == "aten::_scaled_dot_product_attention_math"
    with profile(activities=[ProfilerActivity.CPU]) as other:
        assert record(run, on_gpu=False) == []  # and the other profiler continues
    assert any("attention" in event.name for event in other.events() or ())


def test_doctor_and_start_name_what_ran() -> None:
    model, state = small_model(), torch.get_rng_state()
    found = record_kernels(model, KernelChoice(), CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)  # a run draws what it drew before
    assert found["choice"] == "plain"
    assert set(found["attention"]) == {"encoder", "upm", "llm"}
    assert set(found["attention"].values()) == {FLASH}
    if not torch.cuda.is_available():
        assert "flash_attention_for_cpu" in check_attention().detail
        assert check_kernels().detail == "plain: no CUDA device"
