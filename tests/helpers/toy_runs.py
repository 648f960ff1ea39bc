"""Starts of whole toy runs in one folder, for tests that compare runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from zygote import get_zygote

from onellm_dist.common.errors import EXIT_DONE, EXIT_PREEMPTED
from onellm_dist.shards.sources.toyworld.build import build_toyworld


class Runs:
    """Runs of a recipe over the toy world: fp32, constant rate 1e-3, keys as `train__steps=3`.

    Without a launcher a zygote forks the ranks.
    """

    def __init__(
        self,
        root: Path,
        modalities: tuple[str, ...],
        samples: int,
        recipe: str = "toy/align_image",
        **keys: object,
    ) -> None:
        self.root, self.recipe, self.keys = root, recipe, keys
        self.mixture = "[" + ", ".join(f"{{path: {name}, weight: 1}}" for name in modalities) + "]"
        build_toyworld(
            root / "toy",
            seed=0,
            train_per_modality=samples,
            test_per_modality=2,
            modalities=modalities,
        )

    def run(
        self,
        name: str,
        ranks: int,
        launcher: list[str] | None = None,
        *,
        stop: int | None = None,
        **keys: object,
    ) -> Path:
        """Run it to its end, or to the step in which it is asked to stop (without a launcher)."""
        overrides = self.overrides(name, **{"launch__ranks": ranks, **keys})
        if launcher is None:
            plant = {} if stop is None else {"stop": stop}
            started = get_zygote().start(ranks, overrides, plant, recipe=self.recipe)
            code = EXIT_DONE if stop is None else EXIT_PREEMPTED
            assert set(started.wait(3600)) == {code}, started.output()
            return self.root / name
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [*launcher, self.recipe, *overrides]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=3600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self.root / name

    def overrides(self, name: str, **keys: object) -> list[str]:
        """The keys of a run, as its command line has them."""
        fixed: dict[str, object] = {
            "data.root": self.root / "toy",
            "run.dir": self.root / name,
            "data.workers": 0,
            "data.mixture": self.mixture,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.lr": 1e-3,
            "train.precision": "fp32",
        }
        fixed |= {key.replace("__", "."): value for key, value in {**self.keys, **keys}.items()}
        return [f"{key}={value}" for key, value in fixed.items()]

    def step(self, name: str, step: int) -> Path:
        return self.root / name / "checkpoints" / f"step-{step:08d}"

    def metrics(
        self, name: str, file: str = "metrics.jsonl", key: str = "step"
    ) -> dict[int, dict[str, Any]]:
        """Read the lines of a file by their `key`."""
        return {
            line[key]: line
            for line in map(json.loads, (self.root / name / file).read_text().splitlines())
        }

    def exported(self, name: str) -> dict[str, Tensor]:
        with safe_open(self.root / name / "model" / "model.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
