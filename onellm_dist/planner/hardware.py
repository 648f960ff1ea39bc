"""GPUs, their nodes, and what is assumed of hosts: constants in YAML files with date and source."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from onellm_dist.common.errors import UsageError

CALIBRATION = Path(__file__).parent / "calibration"
"""One file per kind of GPU."""
ASSUMPTIONS = Path(__file__).parent / "assumptions.yaml"
GIGA = 1e9


class Constants(BaseModel):
    """Numbers of a YAML file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GpuKind(Constants):
    """One kind of GPU, in nodes as it is usually sold; the files explain every number."""

    kind: str
    aliases: tuple[str, ...]
    device_names: tuple[str, ...]
    """Names that CUDA gives to such a device, without `NVIDIA`."""
    date: Any
    sources: tuple[str, ...] = Field(min_length=1)
    memory_gb: PositiveFloat
    context_gb: float = Field(ge=0)
    peak_tflops: dict[str, PositiveFloat]
    """`train.precision` to dense TFLOP/s."""
    matmul_share: float = Field(gt=0, le=1)
    attention_share: float = Field(gt=0, le=1)
    convolution_share: float = Field(gt=0, le=1)
    short_inner: float = Field(ge=0)
    bandwidth_gb_s: PositiveFloat
    bandwidth_share: float = Field(gt=0, le=1)
    launch_us: float = Field(ge=0)
    node_bus_gb_s: PositiveFloat
    node_network_gb_s: PositiveFloat
    network_share: float = Field(gt=0, le=1)
    to_host_gb_s: PositiveFloat

    @property
    def bandwidth(self) -> float:
        """Bytes per second that memory-bound kernels reach."""
        return GIGA * self.bandwidth_gb_s * self.bandwidth_share


class TextAssumption(Constants):
    """Mean tokens of a sample's text."""

    tokens: int = Field(ge=1)
    supervised: int = Field(ge=0)


class MediaAssumption(Constants):
    """What reading one sample of a modality takes."""

    decode_ms: float = Field(ge=0)
    kilobytes: float = Field(ge=0)


class HostAssumption(Constants):
    """Host time of the paper's model without an engine."""

    call_us: PositiveFloat
    """Microseconds of an ATen call in forward."""
    module_us: PositiveFloat
    """Microseconds of the Python of a module."""
    backward_call_us: PositiveFloat
    step_ms: float = Field(ge=0)


class Assumptions(Constants):
    """What is assumed where nothing is known; `assumptions.yaml` explains every number."""

    date: Any
    sources: tuple[str, ...]
    text: dict[str, TextAssumption]
    """`data.text_format` to its texts."""
    datasets: dict[str, tuple[str, ...]]
    """Name of a dataset's folder to the modalities of its samples."""
    media: dict[str, MediaAssumption]
    unknown_media: MediaAssumption
    host: HostAssumption
    overlap: float = Field(ge=0, le=1)
    fragmentation: float = Field(ge=0)


_C = TypeVar("_C", bound=Constants)


def _read(path: Path, kind: type[_C]) -> _C:
    return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@cache
def load_assumptions() -> Assumptions:
    """What is assumed where nothing is known."""
    return _read(ASSUMPTIONS, Assumptions)


@cache
def all_gpu_kinds() -> dict[str, GpuKind]:
    """Name to every kind of GPU that has a calibration file."""
    kinds = (_read(path, GpuKind) for path in sorted(CALIBRATION.glob("*.yaml")))
    return {kind.kind: kind for kind in kinds}


def get_gpu_kind(name: str) -> GpuKind:
    """The kind of GPU of this name or alias.

    Raises:
        UsageError: there is none.
    """
    wanted = name.lower()
    for kind in all_gpu_kinds().values():
        if wanted in (kind.kind, *kind.aliases):
            return kind
    raise UsageError(
        f"--gpu {name}: no constants for this GPU",
        "speed and memory cannot be predicted without them.",
        f"use one of: {', '.join(all_gpu_kinds())}.",
    )


def find_gpus_here() -> tuple[GpuKind, int]:
    """The kind of this machine's GPUs, and how many there are.

    Raises:
        UsageError: there is no GPU, or one of a kind without constants.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UsageError(
            "--here: this machine has no GPU that torch can use",
            "there is nothing to plan for.",
            f"name one instead: --gpu {' | '.join(all_gpu_kinds())}.",
        )
    name = torch.cuda.get_device_name(0)
    found = [
        kind
        for kind in all_gpu_kinds().values()
        for part in kind.device_names
        if part == name.removeprefix("NVIDIA ")  # not its PCIe, NVL, Grace or MIG kin
    ]
    if not found:
        raise UsageError(
            f"--here: no constants for {name}",
            "speed and memory cannot be predicted without them.",
            f"name a similar GPU: --gpu {' | '.join(all_gpu_kinds())}.",
        )
    return found[0], count
