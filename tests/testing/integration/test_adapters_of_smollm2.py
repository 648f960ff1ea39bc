"""LoRA on the real SmolLM2-135M with the real media of the integration run, against full tuning.

It fetches packages (the media, and the LLM: 100 MB) and takes ten minutes on two cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from onellm_dist.common.errors import OneLLMError
from onellm_dist.testing.integration import phases
from onellm_dist.testing.integration.integration_run import IntegrationRun
from onellm_dist.testing.integration.memory import PeakMemory
from onellm_dist.train.checkpoint.folder import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.soak]
STEPS = 6
LORA = "{rank: 4, alpha: 8, targets: ['llm.*q_proj', 'llm.*v_proj']}"
"""The layers and the rank of the LoRA paper (arXiv 2106.09685, table 6)."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IntegrationRun]:
    """The media and the LLM; each sample of a step is of another modality."""
    out = tmp_path_factory.mktemp("smollm2")
    with PeakMemory() as memory:
        made = IntegrationRun(out, STEPS, 1, 8, "smollm2-135m", memory)
        try:
            phases.fetch_media(made)
        except OneLLMError as error:
            pytest.skip(f"the packages cannot be fetched here: {error}")
        phases.build_shards(made)
        phases.estimate_time(made)
        yield made


def train(run: IntegrationRun, name: str, steps: int, **keys: str) -> Path:
    """A tuning run of one rank from the pretrained LLM; returns its last checkpoint."""
    fixed = {
        "run.dir": run.out / name,
        "data.root": run.out / "shards",
        "model.path": "null",
        "model.preset": run.preset,
        "train.precision": run.facts["estimate"]["precision"],
        "train.steps": steps,
        "checkpoint.every": steps,
    }
    given = fixed | {key.replace("__", "."): value for key, value in keys.items()}
    line = [f"{key}={value}" for key, value in given.items()]
    with run.measure_phase(name):
        run.run_command(name, [sys.executable, "-m", "onellm_dist.train", "real/tune", *line])
    return run.out / name / "checkpoints" / f"step-{steps:08d}"


def count_state(checkpoint: Path) -> int:
    """Bytes of master weights and optimizer state."""
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def read_losses(run: IntegrationRun, name: str) -> list[float]:
    lines = (run.out / name / "metrics.jsonl").read_text().splitlines()
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [line["loss"] for line in found]


def test_adapters_learn_with_a_fiftieth_of_the_state(run: IntegrationRun) -> None:
    adapted = train(run, "lora", STEPS, train__lora=LORA, optim__lr="2e-3")
    full = train(run, "full", 1)
    losses = read_losses(run, "lora")
    sizes = {path.name: count_state(path) / 1e6 for path in (adapted, full)}
    whole = sum(path.stat().st_size for path in adapted.rglob("*") if path.is_file()) / 1e6
    print(
        f"losses {', '.join(f'{loss:.3f}' for loss in losses)}\n"
        f"trained state in MB: {sizes}; the checkpoint has {whole:.2f} MB\n"
        f"phases: {run.facts['phases']}"
    )
    assert len(losses) == STEPS and mean(losses[-2:]) < 0.9 * mean(losses[:2])
    manifest = read_manifest(adapted)
    assert manifest is not None and all(".lora_" in name for name in manifest["parameters"])
    assert count_state(adapted) <= 0.02 * count_state(full)
    assert whole <= 5.0
