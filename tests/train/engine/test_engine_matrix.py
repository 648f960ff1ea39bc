"""Every engine gives the updates of plain torch in one process.

It does so at 1 to 4 ranks, with every accumulation, packed and unpacked, with adapters (against
PEFT's own in one process), rules of seven rates, and other optimizers. A tiny OneLLM trains 15
steps (20 and 32 in `make soak`) at a constant rate of 2e-3 in two parameter groups, fp32;
modalities are absent from whole steps and from last micro-batches; the loss falls by a fifth. Key
biases, whose true gradient is zero, are left out where the encoder trains; LLaMA and the UPM have
none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from zygote import run_ranks

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "matrix_worker.py"
ZERO3: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 500}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
LEAVES = {"leaf_module": {"classes": ["EncoderBlock", "UPMBlock", "LlamaDecoderLayer"]}}
ENGINES: dict[str, dict[str, Any]] = {
    "zero1": {"config": "zero1"},
    "zero2": {"config": "zero2"},
    "zero3": {"config": {"zero_optimization": ZERO3}},
    "offload": {"config": {"zero_optimization": {**ZERO3, **OFFLOAD}}},
    "fsdp": {"fsdp": {}},
    "zero3_leaves": {"config": {"zero_optimization": {**ZERO3, **LEAVES}}},
    "fsdp_resident": {"fsdp": {}, "resident": True},
    "fsdp_ahead": {"fsdp": {"prefetch": 2}},
    "fsdp_joined": {"fsdp": {"prefetch": 1, "unit_parameters": 20_000}},
    "fsdp_once": {"fsdp": {"reduce_every_micro_batch": False}},
    "zero3_hpz": {"config": {"zero_optimization": {**ZERO3, "zero_hpz_partition_size": 2}}},
    "fsdp_gathered": {"fsdp": {"reduce_every_micro_batch": False}, "resident": True},
    "fsdp_hybrid": {"fsdp": {"shard_ranks": 2}},
    "fsdp_hybrid_once": {"fsdp": {"shard_ranks": 2, "reduce_every_micro_batch": False}},
    "fsdp_hybrid_gathered": {
        "fsdp": {"shard_ranks": 2, "reduce_every_micro_batch": False},
        "resident": True,
    },
    "fsdp_gathered_joined": {
        "fsdp": {"prefetch": 1, "unit_parameters": 20_000, "reduce_every_micro_batch": False},
        "resident": True,
    },
}
BASIC = ("zero1", "zero2", "zero3", "offload", "fsdp", "fsdp_once")
KEPT = ("zero3_leaves", "fsdp_resident", "fsdp_gathered")
UNITS = ("fsdp_ahead", "fsdp_joined", "fsdp_gathered_joined")
"""With four layers an LLM has three units to gather ahead, or two joined ones of two blocks."""
WIDE = ("zero3_hpz", "fsdp_hybrid", "fsdp_hybrid_once", "fsdp_hybrid_gathered")
"""Four ranks as 2 x 2."""


def job(
    engine: str, accumulate: int | None, steps: int = 20, stage: str = "align", **rest: Any
) -> dict[str, Any]:
    pack = "unpacked" if accumulate is None else f"by{accumulate}"
    extra = "".join(f"_{key}_{value}" for key, value in rest.items())
    return {
        "name": f"{engine}_{pack}_{stage}_{steps}{extra}",
        **ENGINES[engine],
        "accumulate": accumulate,
        "steps": steps,
        "stage": stage,
        **rest,
    }


SHORT = 15
"""Steps of `make test`."""
JOBS: dict[int, list[dict[str, Any]]] = {
    1: [job("zero2", None, SHORT, "lora")],
    2: [
        job("offload", 2, SHORT, "encoder"),
        job("fsdp_once", 4, SHORT, "joint", optimizer="lion"),
        job("zero3", 2, SHORT, "lora"),
        *(job(engine, 2, SHORT) for engine in ("zero3", "fsdp")),
        *(job(engine, 2, SHORT, bf16=True) for engine in ("zero3", "fsdp")),
        job("zero3_leaves", 2, SHORT, "tune", recompute="selective", layers=4),
        job("fsdp_resident", None, SHORT),
        job("fsdp_gathered", 4, SHORT),
        job("fsdp_joined", 2, SHORT, "tune", recompute="full", layers=4),
    ],
    3: [job("zero1", 1, SHORT)],
    4: [job(engine, 2, SHORT) for engine in ("zero3_hpz", "fsdp_hybrid_once")],
}
"""What `make test` runs: each kind of engine, number of ranks, accumulation, stage, recomputation
and optimizer somewhere; `make soak` has everything with everything."""
TUNING = ("both", "joint", "lora", "lora_llm", "dora")
TUNING_ROWS = [
    *((stage, "adamw") for stage in TUNING),
    *((stage, optimizer) for stage in ("joint", "lora") for optimizer in ("sgd", "lion")),
]
"""(stage, optimizer): what is compared under ZeRO-2, ZeRO-3 and FSDP2 at 1, 2 and 4 ranks."""
SOAK_JOBS = {
    ranks: [
        *(
            job(engine, n)
            for engine in (*BASIC, *(WIDE if ranks == 4 else ()))
            for n in (1, 2, 4, None)
        ),
        *(job(engine, 2, 32, stage) for engine in BASIC for stage in ("align", "tune")),
        *(job(engine, 2, bf16=True) for engine in BASIC),
        *(job(engine, n) for engine in KEPT for n in (1, 2, 4, None)),
        *(job(e, 2, stage=s) for e in KEPT for s in ("tune", "joint", "encoder", "lora", "dora")),
        job("zero3_leaves", 2, stage="lora_llm"),
        *(job(e, 2, stage="align", recompute=r) for e in KEPT for r in ("selective", "full")),
        *(job(engine, 2, bf16=True) for engine in (*KEPT, *UNITS)),
        *(job(e, n, stage=s) for e in UNITS for n in (1, None) for s in ("align", "lora")),
        *(
            job(e, 2, stage="tune", recompute=r, layers=4)
            for e in UNITS
            for r in ("selective", "full")
        ),
        *(
            job(e, 2, stage=s, recompute=r)
            for e in ("zero3", "fsdp")
            for s in ("align", "tune")
            for r in ("selective", "full")
        ),
        *(job(e, 2, stage=s) for e in ("zero1", "offload", "fsdp_once") for s in TUNING),
        *(job(engine, 2, stage="dora", recompute="full") for engine in ("zero3", "fsdp")),
        *(job(engine, 2, stage="encoder") for engine in ("zero3", "fsdp")),
        *(job(e, 4, stage="joint", optimizer=o) for e in BASIC for o in ("sgd", "lion")),
        *(job(e, n, stage="lora") for e in ("zero2", "zero3", "fsdp") for n in (1, 4, None)),
    ]
    for ranks in (1, 2, 3, 4)
}
"""Everything with everything."""
SOAK_TIMEOUT = 7000
FP32 = [(ranks, j["name"]) for ranks, jobs in JOBS.items() for j in jobs if "bf16" not in j]
BF16 = [(ranks, j["name"]) for ranks, jobs in JOBS.items() for j in jobs if "bf16" in j]


def run_jobs(
    out: Path, ranks: int, jobs: list[dict[str, Any]], timeout: float = 800
) -> dict[str, Any]:
    (out / str(ranks)).mkdir(exist_ok=True)
    (out / str(ranks) / "jobs.json").write_text(json.dumps(jobs))
    own = out / str(ranks)
    run_ranks(WORKER, [str(own), str(own / "jobs.json"), str(out / "plain.pt")], ranks, timeout)
    found: dict[str, Any] = json.loads((out / str(ranks) / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What every job gave: four launches, one for each number of ranks."""
    out = tmp_path_factory.mktemp("matrix")
    return {ranks: run_jobs(out, ranks, jobs) for ranks, jobs in JOBS.items()}


def check_numbers(one: dict[str, Any], bf16: bool) -> None:
    assert one["fall"] > 0.2
    assert one["loss"] < (1e-2 if bf16 else 1e-5)
    assert one["update"] < (0.15 if bf16 else 1e-3)


def check_weights(one: dict[str, Any]) -> None:
    assert one["unmoved"] == []
    assert one["frozen"] == []
    assert one["complete"]
    assert one["exported"]


@pytest.mark.parametrize(("ranks", "name"), FP32)
def test_fp32_follows_plain_torch(found: dict[int, dict[str, Any]], ranks: int, name: str) -> None:
    check_numbers(found[ranks][name], bf16=False)


@pytest.mark.parametrize(("ranks", "name"), BF16)
def test_bf16_stays_within_its_bound_of_fp32(
    found: dict[int, dict[str, Any]], ranks: int, name: str
) -> None:
    """Losses of 15 steps within 1%, the update within 15% of fp32's (seen over 20: 0.3% and 7%)."""
    check_numbers(found[ranks][name], bf16=True)


@pytest.mark.parametrize(("ranks", "name"), FP32 + BF16)
def test_every_group_moves_and_frozen_weights_are_bit_identical(
    found: dict[int, dict[str, Any]], ranks: int, name: str
) -> None:
    check_weights(found[ranks][name])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder; its rows share what plain torch gives."""
    return tmp_path_factory.mktemp("tuned")


@pytest.mark.soak
@pytest.mark.parametrize("row", TUNING_ROWS, ids="-".join)
def test_tuning_follows_plain_torch_and_peft(tuned: Path, row: tuple[str, str]) -> None:
    stage, optimizer = row
    jobs = {e: job(e, 2, stage=stage, optimizer=optimizer) for e in ("zero2", "zero3", "fsdp")}
    found: dict[str, Any] = {}
    for ranks in (1, 2, 4):
        results = run_jobs(tuned, ranks, list(jobs.values()), timeout=SOAK_TIMEOUT)
        found |= {f"{e} at {ranks}": results[one["name"]] for e, one in jobs.items()}
    for kind in ("loss", "update"):
        where, worst = max(found.items(), key=lambda item: item[1][kind])
        print(f"{' '.join(row)}: worst {kind} {worst[kind]:.1e} ({where})")
    for one in found.values():
        check_numbers(one, bf16=False)
        check_weights(one)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", sorted(SOAK_JOBS))
def test_everything_with_everything(tmp_path: Path, ranks: int) -> None:
    results = run_jobs(tmp_path, ranks, SOAK_JOBS[ranks], timeout=SOAK_TIMEOUT)
    for name, one in results.items():
        check_numbers(one, bf16="bf16" in name)
        check_weights(one)
