"""Where the files of one demo are, and what it runs on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from onellm_dist.common import run_files
from onellm_dist.testing.demo.scale import DemoScale

RANKS = 2
RUNS = ("align_image", "align_all", "tune")
"""The training runs, in order."""


@dataclass(frozen=True)
class Demo:
    """One demo in the folder `out`."""

    out: Path
    scale: DemoScale
    ranks: int

    @property
    def toy(self) -> Path:
        """The datasets, one folder per modality."""
        return self.out / "toy"

    @property
    def pretrained(self) -> Path:
        """The weights of the toy towers, and the results of their pretraining."""
        return self.out / "pretrained"

    @property
    def towers(self) -> Path:
        """The OneLLM directory with the toy towers."""
        return self.out / "towers"

    @property
    def captions(self) -> Path:
        """The captions of all test samples."""
        return self.out / "captions.jsonl"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.out / "report.html"

    def run_dir(self, name: str) -> Path:
        """Directory of a run."""
        return self.out / "runs" / name

    def model(self, name: str) -> Path:
        """The model that a run exports."""
        return self.run_dir(name) / run_files.MODEL

    def model_before(self, name: str) -> Path:
        """The model that a run starts from: the towers, or the model of the run before."""
        index = RUNS.index(name)
        return self.towers if index == 0 else self.model(RUNS[index - 1])

    def log(self, name: str) -> Path:
        """Log file of a command."""
        return self.out / "logs" / f"{name}.log"


def count_ranks() -> int:
    """Number of ranks: two, or one on a machine with a single GPU."""
    return min(RANKS, torch.cuda.device_count()) if torch.cuda.is_available() else RANKS


def describe_device() -> str:
    """The GPU's name, or the number of CPU cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{os.cpu_count()} CPU cores"
