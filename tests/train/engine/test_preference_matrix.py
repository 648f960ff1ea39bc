"""DPO under every engine gives the updates of plain torch, over answers one by one.

The reference is the model without its adapters, or a frozen copy; 20 steps in fp32, of pairs with
and without media, with steps and micro-batches that lack some.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from zygote import run_ranks

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "preference_worker.py"
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 500}}
ENGINES: dict[str, dict[str, Any]] = {
    "zero1": {"config": "zero1"},
    "zero2": {"config": "zero2"},
    "zero3": {"config": ZERO3},
    "fsdp": {"fsdp": {}},
    "fsdp_resident": {"fsdp": {}, "resident": True},
    "fsdp_ahead": {"fsdp": {"prefetch": 2, "unit_parameters": 12_000}},
}
"""`fsdp_ahead` joins the UPM's blocks (10,304), and gathers ahead in LLM (12,608) and encoder."""
REFERENCES = ("adapter", "copy")


def job(engine: str, reference: str, accumulate: int | None, **rest: Any) -> dict[str, Any]:
    name = f"{engine}_{reference}_{accumulate}" + "".join(f"_{x}" for x in rest.values())
    keys = {"name": name, "reference": reference, "accumulate": accumulate}
    return {**ENGINES[engine], **keys, **rest}


JOBS = {2: [job("zero3", "adapter", 2), job("fsdp_ahead", "copy", 1)]}
"""What `make test` runs: each kind of engine, with one reference or the other."""
SOAK_JOBS = [
    *(job(e, r, 2) for e in ("zero2", "zero3", "fsdp") for r in REFERENCES),
    job("zero1", "copy", None),
    job("fsdp_resident", "adapter", None),
    job("zero3", "copy", 4, recompute="full"),
    job("fsdp", "adapter", 1, recompute="selective"),
    job("fsdp_ahead", "copy", 1),
]


def run_jobs(out: Path, ranks: int, jobs: list[dict[str, Any]], timeout: float) -> dict[str, Any]:
    own = out / str(ranks)
    own.mkdir()
    (own / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(WORKER, [str(own), str(out / "plain.pt")], ranks, timeout)
    found: dict[str, Any] = json.loads((own / "found.json").read_text())
    return found


def check(name: str, one: dict[str, Any]) -> None:
    assert one["first"] == pytest.approx(math.log(2), abs=1e-6), "both models are the same at first"
    assert one["fall"] > 0.2, name
    assert one["loss"] < 1e-5, name
    assert one["margin"] < 1e-4, name
    assert one["update"] < 1e-3, name
    assert one["complete"], "a copy would be in the state"
    assert one["frozen"] == [], name
    assert one["exported"], "a copy would be in the exported model"
    assert (one["copies"] > 0) == ("_copy_" in name)
    assert one["moved_copies"] == [], name


def test_pairs_follow_plain_torch(tmp_path: Path) -> None:
    for ranks, jobs in JOBS.items():
        for name, one in run_jobs(tmp_path, ranks, jobs, 800).items():
            check(name, one)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pairs_follow_plain_torch_everywhere(tmp_path: Path, ranks: int) -> None:
    results = run_jobs(tmp_path, ranks, SOAK_JOBS, 7000)
    for kind in ("loss", "margin", "update"):
        where, worst = max(results.items(), key=lambda item: item[1][kind])
        print(f"{ranks} ranks: worst {kind} {worst[kind]:.1e} ({where})")
    for name, one in results.items():
        check(name, one)
