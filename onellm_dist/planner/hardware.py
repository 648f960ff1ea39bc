"""GPUs, their nodes, and what is assumed of hosts: constants in YAML files with date and source."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.errors import UsageError
from onellm_dist.common.resources import user_cache

CALIBRATION = Path(__file__).parent / "calibration"
"""One file per kind of GPU."""
ASSUMPTIONS = Path(__file__).parent / "assumptions.yaml"
GIGA = 1e9
FLOAT8 = "fp8"
"""Name of the rate of float8 products, where a GPU has them."""


class Constants(BaseModel):
    """Numbers of a YAML file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HostAssumption(Constants):
    """Host time of the paper's model without an engine."""

    call_us: PositiveFloat
    """Microseconds of an ATen call in forward."""
    module_us: PositiveFloat
    """Microseconds of the Python of a module."""
    backward_call_us: PositiveFloat
    step_ms: float = Field(ge=0)


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
    """`train.precision`, and `fp8` where a GPU has it, to dense TFLOP/s."""
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
    board_watts: PositiveFloat | None = None
    """Power that the board may draw; None where it is not known."""
    power_source: str = ""
    """Who says so."""
    host: HostAssumption | None = None
    """Host time that was measured; None: that of `assumptions.yaml`."""
    shared: bool = False
    """Whether the ranks of a node share the device: the processors of a machine."""
    measured: tuple[str, ...] = ()
    """The constants that `onellm plan --calibrate` measured; the others come from `sources`."""

    def multiplies_float8(self, precision: str) -> bool:
        """Whether products of float8 layers run in float8.

        Args:
            precision: `train.precision`.
        """
        return FLOAT8 in self.peak_tflops and precision == "bf16"

    @property
    def bandwidth(self) -> float:
        """Bytes per second that memory-bound kernels reach."""
        return GIGA * self.bandwidth_gb_s * self.bandwidth_share

    def divide(self, ranks: int) -> GpuKind:
        """What each of the ranks of a node has of a device that they share."""
        if not self.shared or ranks == 1:
            return self
        split = ("memory_gb", "bandwidth_gb_s", "to_host_gb_s", "node_bus_gb_s")
        changes: dict[str, Any] = {name: getattr(self, name) / ranks for name in split}
        changes["peak_tflops"] = {name: x / ranks for name, x in self.peak_tflops.items()}
        if self.board_watts is not None:
            changes["board_watts"] = self.board_watts / ranks
        return self.model_copy(update=changes)


class TextAssumption(Constants):
    """Mean tokens of a sample's text."""

    tokens: int = Field(ge=1)
    supervised: int = Field(ge=0)


class MediaAssumption(Constants):
    """What reading one sample of a modality takes."""

    decode_ms: float = Field(ge=0)
    kilobytes: float = Field(ge=0)


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


def get_user_folder() -> Path | None:
    """Where `onellm plan --calibrate` writes; None for a user without a home directory."""
    try:
        return user_cache() / "calibration"
    except RuntimeError:
        return None


@cache
def _read_kind(path: Path, _: int) -> GpuKind:
    """Read a calibration file; the second argument is when it was written.

    Raises:
        UsageError: it is damaged.
    """
    try:
        return _read(path, GpuKind)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path}: not a calibration file: {get_first_line(error)}",
            "its constants decide what a plan says.",
            "remove it, and measure again: onellm plan --calibrate.",
        ) from None


def all_gpu_kinds(*, shipped_only: bool = False) -> dict[str, GpuKind]:
    """Name to every kind of device with a calibration file; the user's own come before ours.

    Args:
        shipped_only: without the user's own.

    Raises:
        UsageError: a file of the user is damaged.
    """
    own = None if shipped_only else get_user_folder()
    folders = [CALIBRATION, *filter(None, [own])]
    paths = [path for folder in folders for path in sorted(folder.glob("*.yaml"))]
    kinds = (_read_kind(path, path.stat().st_mtime_ns) for path in paths)
    return {kind.kind: kind for kind in kinds}


def get_gpu_kind(name: str) -> GpuKind:
    """The kind of device of this name or alias.

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
        f"use one of: {', '.join(all_gpu_kinds())}; or measure them on such a machine: "
        "onellm plan --calibrate.",
    )


def find_kind(device_name: str, *, shipped_only: bool = False) -> GpuKind | None:
    """The kind of a device by the name that it gives itself; None: it has no constants.

    Args:
        device_name: as `name_device` says it.
        shipped_only: as of `all_gpu_kinds`.
    """
    own = device_name.removeprefix("NVIDIA ")  # not its PCIe, NVL, Grace or MIG kin
    kinds = all_gpu_kinds(shipped_only=shipped_only).values()
    return next((kind for kind in kinds if own in kind.device_names), None)


def find_gpus_here() -> tuple[GpuKind, int]:
    """The kind of this machine's devices, and how many there are: GPUs, else its processors.

    Raises:
        UsageError: there are no constants for them.
    """
    import torch

    from onellm_dist.train.distributed import name_device

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = name_device(torch.device("cuda", 0) if count else torch.device("cpu"))
    kind = find_kind(name)
    if kind is not None:
        return kind, count or 1
    known = " | ".join(all_gpu_kinds())
    measure = "or measure them in two minutes: onellm plan --calibrate."
    if not count:
        raise UsageError(
            f"--here: this machine has no GPU that torch can use, and no constants for {name}",
            "speed and memory cannot be predicted without them.",
            f"name a GPU instead: --gpu {known}; {measure}",
        )
    raise UsageError(
        f"--here: no constants for {name}",
        "speed and memory cannot be predicted without them.",
        f"name a similar GPU: --gpu {known}; {measure}",
    )
