"""Both engines behind their interface, on several ranks.

Gradients are exact whatever a rank is assigned, skipped steps leave no trace, checkpoints resume at
another number of ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from zygote import run_ranks

WORKER = Path(__file__).parent / "engine_worker.py"
ZERO3: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}
}
"""Parameters above 100 elements are sharded: the test model is small."""
OFFLOAD: dict[str, Any] = {
    "zero_optimization": {
        **ZERO3["zero_optimization"],
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
}
SGD = {"name": "sgd", "options": {"momentum": 0.9}}
GATHERED: dict[str, Any] = {
    "fsdp": {"reduce_every_micro_batch": False},
    "resident": True,
    "blocks": ["Tower", "Branch"],
}
"""Trained weights stay gathered for a step; each block is a unit."""
JOBS: tuple[dict[str, Any], ...] = (
    {"name": "zero0", "config": {}},
    {"name": "zero1", "config": "zero1"},
    {"name": "zero2", "config": "zero2"},
    {"name": "zero3", "config": ZERO3},
    {"name": "zero3_offload", "config": OFFLOAD},
    {"name": "zero2_tune", "config": "zero2", "stage": "tune"},
    {"name": "zero3_tune", "config": ZERO3, "stage": "tune"},
    {"name": "zero1_bf16", "config": "zero1", "bf16": True},
    {"name": "zero2_bf16", "config": "zero2", "bf16": True},
    {"name": "zero3_bf16", "config": ZERO3, "bf16": True},
    {"name": "fsdp", "fsdp": {}},
    {"name": "fsdp_reduced_once", "fsdp": {"reduce_every_micro_batch": False}},
    {"name": "fsdp_tune", "fsdp": {}, "stage": "tune"},
    {"name": "fsdp_bf16", "fsdp": {}, "bf16": True},
    {"name": "fsdp_reduced_once_bf16", "fsdp": {"reduce_every_micro_batch": False}, "bf16": True},
    {"name": "zero3_sgd", "config": ZERO3, "optim": SGD},
    {"name": "zero1_sgd", "config": "zero1", "optim": SGD},
    {"name": "fsdp_sgd", "fsdp": {}, "optim": SGD},
    {"name": "fsdp_gathered", **GATHERED},
    {"name": "fsdp_gathered_bf16", **GATHERED, "bf16": True},
    {"name": "fsdp_gathered_tune", **GATHERED, "stage": "tune"},
    {"name": "fsdp_gathered_sgd", **GATHERED, "optim": SGD},
)
SOAK = ("fsdp_gathered_bf16", "fsdp_gathered_tune", "fsdp_gathered_sgd")
"""Run by `make soak` alone."""
EVERY = [
    pytest.param(job["name"], marks=pytest.mark.soak if job["name"] in SOAK else ()) for job in JOBS
]
FP32 = [param for param, job in zip(EVERY, JOBS, strict=True) if not job.get("bf16")]
pytestmark = pytest.mark.slow


def run_worker(out: Path, ranks: int, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    run_ranks(WORKER, [str(out), json.dumps(jobs)], ranks)
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def two(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """All jobs; those of `make soak` where a test of this session asks for them."""
    out = tmp_path_factory.mktemp("two_ranks")
    asked = {item.name for item in request.session.items if item.path == request.path}
    jobs = [
        job
        for job in JOBS
        if job["name"] not in SOAK or any(f"[{job['name']}]" in name for name in asked)
    ]
    return out, run_worker(out, 2, jobs)


@pytest.mark.parametrize("name", FP32)
def test_updates_equal_one_process_with_all_samples(
    two: tuple[Path, dict[str, Any]], name: str
) -> None:
    """Rank 0 is assigned only branch a, rank 1 only b; then b is absent for two steps, then a."""
    found = two[1][name]
    assert found["losses"] < 1e-5
    assert found["update_error"] < 1e-4, found["worst"]


@pytest.mark.parametrize("name", EVERY)
def test_what_trains_moves_and_what_is_frozen_does_not(
    two: tuple[Path, dict[str, Any]], name: str
) -> None:
    assert two[1][name]["frozen"]
    assert two[1][name]["moved"]


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_ends_bit_identical(two: tuple[Path, dict[str, Any]], name: str) -> None:
    found = two[1][name]
    assert found["resume_identical"]
    assert found["resume_losses"] == 0
    assert found["steps"] == 8


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_anywhere(
    two: tuple[Path, dict[str, Any]], name: str
) -> None:
    """Nor does a last micro-batch that is empty on all ranks and reaches nothing that trains."""
    assert not two[1][name]["poisoned_applied"]
    assert two[1][name]["poisoned_kept"]


@pytest.mark.parametrize("name", EVERY)
def test_a_good_step_that_is_skipped_leaves_no_trace(
    two: tuple[Path, dict[str, Any]], name: str
) -> None:
    """Neither in the weights nor in what follows: state, count of steps, next gradients."""
    found = two[1][name]
    assert not found["discarded_applied"]
    assert found["discarded_steps"] == 8
    assert found["discarded_kept"]
    assert found["goes_on_identical"]


@pytest.mark.parametrize("name", EVERY)
def test_the_norm_is_that_of_one_process_with_all_samples(
    two: tuple[Path, dict[str, Any]], name: str
) -> None:
    assert two[1][name]["norm_error"] < (1e-5 if "bf16" not in name else 0.03)


@pytest.mark.parametrize("name", EVERY)
def test_norms_of_the_parts_add_up_to_the_total(
    two: tuple[Path, dict[str, Any]], name: str
) -> None:
    found = two[1][name]
    trained = {"llm"} if "tune" in name else {"branches", "upm"}
    for norm, parts in zip(found["norms"], found["parts"], strict=True):
        assert set(parts) == trained
        assert all(value > 0 for value in parts.values())
        total = sum(value**2 for value in parts.values()) ** 0.5
        assert (
            total < norm if "tune" in name else total == pytest.approx(norm, rel=1e-5)
        )  # the embedding is in no part


@pytest.mark.parametrize("name", [param for param in EVERY if "gathered" in str(param.values[0])])
def test_weights_stay_gathered_for_a_step_and_no_longer(
    two: tuple[Path, dict[str, Any]], name: str
) -> None:
    """Forward passes without backward before each step change nothing.

    Without gradients they leave nothing gathered; with them they do, and the step frees it.
    """
    found = two[1][name]
    held, whole = found["held"], [found["whole"]]
    assert held["between"] == held["forward_alone"] == whole
    assert held["after_last"] == held["validated"] == held["logits"] == held["stepped"] == [0]
    assert found["same_beside_passes"]


@pytest.mark.parametrize(
    ("ranks", "every"),
    [(1, True), (3, True), (4, False), pytest.param(4, True, marks=pytest.mark.soak)],
)
def test_a_checkpoint_of_two_ranks_resumes_at_other_sizes_stages_and_engines(
    two: tuple[Path, dict[str, Any]], tmp_path: Path, ranks: int, every: bool
) -> None:
    """At 4 ranks there is hybrid sharding too; `make soak` adds there what 3 ranks have."""
    jobs: list[dict[str, Any]] = [
        {"name": "zero3", "config": ZERO3, "from": str(two[0] / "zero2")},
        {"name": "zero1", "config": "zero1", "from": str(two[0] / "zero3")},
        {"name": "zero0", "config": {}, "from": str(two[0] / "zero3")},
        {"name": "tune", "config": "zero2", "stage": "tune", "from": str(two[0] / "zero3_tune")},
        {"name": "fsdp", "fsdp": {}, "from": str(two[0] / "zero3")},
        {"name": "fsdp_tune", "fsdp": {}, "stage": "tune", "from": str(two[0] / "zero2_tune")},
        {"name": "back", "config": ZERO3, "from": str(two[0] / "fsdp")},
        {"name": "sgd", "fsdp": {}, "optim": SGD, "from": str(two[0] / "zero3_sgd")},
        {"name": "sgd_back", "config": ZERO3, "optim": SGD, "from": str(two[0] / "fsdp_sgd")},
        {"name": "gathered", **GATHERED, "from": str(two[0] / "zero3")},
        {"name": "gathered_back", "config": ZERO3, "from": str(two[0] / "fsdp_gathered")},
    ]
    if ranks == 4:
        jobs = jobs if every else jobs[:1]
        hybrid = {"shard_ranks": 2}
        jobs += [
            {"name": "hybrid", "fsdp": hybrid, "from": str(two[0] / "zero3")},
            {
                "name": "hybrid_gathered",
                **GATHERED,
                "fsdp": {**GATHERED["fsdp"], **hybrid},
                "from": str(two[0] / "fsdp_gathered"),
            },
        ]
    for name, found in run_worker(tmp_path, ranks, jobs).items():
        assert found["steps"] == 5, name
        assert found["losses"] < 1e-5, name
        assert found["update_error"] < 1e-4, name


def test_a_start_loads_no_compiler(tmp_path: Path) -> None:
    """DeepSpeed's Muon would load inductor in every rank, which takes 2 s."""
    out = tmp_path / "loaded.json"
    run_ranks(WORKER.with_name("modules_worker.py"), [str(out)], 1)
    assert json.loads(out.read_text()) == {"inductor": False, "muon": True, "switched off": False}
