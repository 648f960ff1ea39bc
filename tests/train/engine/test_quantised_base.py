"""Adapters over an LLM in int8 and nf4, under each engine: PEFT's numbers over torchao's layers."""

from __future__ import annotations

from typing import Any

import pytest
from test_engine_matrix import check_numbers, check_weights, job, run_jobs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "not __import__('importlib').util.find_spec('torchao')", reason="no torchao"
    ),
]
FORMATS = {"int8": 0.005, "nf4": 0.05}
"""Format to how far a loss may lie from that over plain weights, relative."""
JOBS = {
    ranks: [
        *(job(e, 2, stage="lora_llm", frozen_weights=f) for e in engines for f in FORMATS),
        *(job(e, 2, stage="lora_llm") for e in engines[:1]),
        *(
            job(e, 2, stage="lora_llm", frozen_weights="nf4", recompute="full")
            for e in engines[1:2]
        ),
        *(
            job(e, 2, stage="lora_llm", frozen_weights=f, recompute="selective")
            for e, f in zip(engines[:2], FORMATS, strict=True)
        ),
        *(job(e, 2, stage="align", frozen_weights="int8") for e in engines[:2]),
        *(job(e, 2, stage="lora_llm", frozen_weights="nf4", bf16=True) for e in engines[:2]),
        job("zero3", 2, stage="lora_llm", frozen_weights="int8", bf16=True),
    ]
    for ranks, engines in {
        1: ("zero2", "fsdp"),
        2: ("zero2", "fsdp", "fsdp_resident", "zero1", "zero3", "offload"),
    }.items()
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    out = tmp_path_factory.mktemp("quantised")
    return {ranks: run_jobs(out, ranks, jobs, timeout=3000) for ranks, jobs in JOBS.items()}


CASES = [(ranks, j["name"]) for ranks, jobs in JOBS.items() for j in jobs]


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_losses_and_updates_are_those_of_peft_over_torchao(
    found: dict[int, dict[str, Any]], ranks: int, name: str
) -> None:
    """The weights that were rounded come back as they were before, bit for bit.

    In bf16 the losses lie within 1% of fp32's, and the update within 15%.
    """
    one = found[ranks][name]
    print(f"{name} at {ranks}: loss {one['loss']:.1e}, update {one['update']:.1e}")
    check_numbers(one, bf16="bf16" in name)
    check_weights(one)


@pytest.mark.parametrize("format", FORMATS)
def test_losses_lie_near_those_over_plain_weights(
    found: dict[int, dict[str, Any]], format: str
) -> None:
    plain = found[2]["zero2_by2_lora_llm_20"]["losses"]
    rounded = found[2][f"zero2_by2_lora_llm_20_frozen_weights_{format}"]["losses"]
    gaps = [abs(a - b) / b for a, b in zip(rounded, plain, strict=True)]
    print(f"{format}: the largest difference of a loss is {max(gaps):.2%}")
    assert 0 < max(gaps) < FORMATS[format]
