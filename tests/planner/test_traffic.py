"""The collectives of real ranks (gloo), in bytes, against what engines say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plain_counts import make_config
from stage_setup import freeze_for_stage
from traffic_worker import MICRO_BATCHES, NAMES, TEXT
from zygote import run_ranks

from onellm_dist.config.schema import EngineSection
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.planner.counting import count_pack
from onellm_dist.planner.pack_shapes import SampleShape, make_meta_batch
from onellm_dist.planner.run_plan import build_model, get_modalities
from onellm_dist.planner.traffic import compute_traffic
from onellm_dist.train.engine.description import StepTraffic

pytestmark = pytest.mark.slow
ZERO3 = {
    "stage": 3,
    "reduce_bucket_size": 20_000_000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    # Small against the toy model, as the defaults are against a 7B.
    "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 1,
}
CHOICES: dict[str, tuple[dict[str, Any], str]] = {
    "zero1": ({"config": "zero1"}, "none"),
    "zero2": ({"config": "zero2"}, "none"),
    "zero3": ({"config": "ZERO3"}, "none"),
    "zero3_full": ({"config": "ZERO3"}, "full"),
    "fsdp_resident": ({"name": "fsdp", "frozen": "resident"}, "full"),
    "fsdp": ({"name": "fsdp"}, "none"),
    "fsdp_full": ({"name": "fsdp"}, "full"),
    "fsdp_step": ({"name": "fsdp", "reduce_every": "step"}, "none"),
    "fsdp_once": ({"name": "fsdp", "reduce_every": "step", "frozen": "resident"}, "full"),
}

SOAK = ("zero3", "fsdp")
"""With recomputation these gather all that they gather without, and once more."""


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], str]]:
    path = tmp_path_factory.mktemp("config") / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": ZERO3}))
    return {
        name: ({k: str(path) if v == "ZERO3" else v for k, v in keys.items()}, mode)
        for name, (keys, mode) in CHOICES.items()
    }


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    choices: dict[str, tuple[dict[str, Any], str]],
) -> dict[str, dict[str, int]]:
    own = (item for item in request.session.items if item.path == request.path)
    asked = {item.name.rpartition("[")[2].rstrip("]") for item in own}
    out = tmp_path_factory.mktemp("traffic")
    worker = Path(__file__).parent / "traffic_worker.py"
    listed = [(name, keys, mode) for name, (keys, mode) in choices.items() if name in asked]
    run_ranks(worker, [str(out / "found.json"), json.dumps(listed)], 2)
    found: dict[str, dict[str, int]] = json.loads((out / "found.json").read_text())
    return found


def predict(keys: dict[str, Any], mode: str) -> StepTraffic:
    config = make_config()
    model: Any = build_model(config)
    freeze_for_stage(model, "align", NAMES)
    enable_activation_checkpointing(model, mode)
    model.train()
    pack = tuple(SampleShape((name,), TEXT, TEXT - 1) for name in NAMES)
    return compute_traffic(
        EngineSection.model_validate(keys),
        model,
        count_pack(model, make_meta_batch(pack, list(get_modalities(config).values()))).uses,
        world_size=2,
        compute_bytes=4,
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.soak) if name in SOAK else name for name in CHOICES],
)
def test_collectives_of_a_step_have_the_bytes_that_engines_say(
    name: str,
    choices: dict[str, tuple[dict[str, Any], str]],
    measured: dict[str, dict[str, int]],
) -> None:
    """FSDP2 also prefetches the unit before, in backward, where that has no backward.

    Here that is the embedding and one block of the encoder: 4% of the toy model, 1% of a 7B.
    """
    said = predict(*choices[name])
    gathers = {kind: size for kind, size in measured[name].items() if "gather" in kind}
    reductions = {kind: size for kind, size in measured[name].items() if "reduce" in kind}
    assert sum(gathers.values()) == pytest.approx(
        said.count_gathered(MICRO_BATCHES),
        rel=0.05 if name.startswith("fsdp") else 0.02,
    )
    assert sum(reductions.values()) == pytest.approx(said.count_reduced(MICRO_BATCHES), rel=0.005)
