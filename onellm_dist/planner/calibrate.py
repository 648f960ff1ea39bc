"""`onellm plan --calibrate`: measures the constants of this machine, and writes them to a file."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.output import write_output
from onellm_dist.common.resources import user_cache
from onellm_dist.config.yaml_text import dump_yaml
from onellm_dist.model.presets import build_config
from onellm_dist.model.quantised.float8 import choose_products
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.planner.counting import PackCount, count_pack
from onellm_dist.planner.hardware import (
    FLOAT8,
    GIGA,
    GpuKind,
    HostAssumption,
    find_kind,
    load_assumptions,
)
from onellm_dist.planner.measure import THIN, DeviceMeter
from onellm_dist.planner.pack_shapes import SampleShape, make_meta_batch
from onellm_dist.planner.run_plan import build_model, get_modalities
from onellm_dist.train.distributed import name_device

SECONDS = 3.0
"""Seconds of each measurement; there are about a dozen."""
MICRO = 1e6
TERA = 1e12
MEBI = 1 << 20
"""Bytes of a MiB, in which `nvidia-smi` counts memory."""
TINY = (SampleShape((), 8, 7),)
"""A micro-batch that computes next to nothing: what it takes, the host takes."""


def run_calibration(*, seconds: float = SECONDS, out: Path | None = None) -> int:
    """Measure this machine's GPU, or its processors if there is none, and write a file.

    Args:
        seconds: of each measurement.
        out: the file; default: one in the user's cache, which `--gpu` and `--here` read.

    Returns:
        The exit code.

    Raises:
        UsageError: the file cannot be written.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    name = name_device(device)
    before = find_kind(name)
    begin = time.perf_counter()
    kind = calibrate(device, seconds=seconds)
    taken = time.perf_counter() - begin
    path = out or user_cache() / "calibration" / f"{kind.kind}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, format_kind(kind, name))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}",
            "what was measured is lost.",
            "give another file: --write FILE, or set ONELLM_CACHE.",
        ) from None
    write_output(f"{name}, measured in {taken:.0f} s:")
    for constant in kind.measured:
        value = _format(getattr(kind, constant))
        old = "" if before is None else f"  (before: {_format(getattr(before, constant))})"
        write_output(f"  {constant:<18} {value}{old}")
    write_output(f"written: {path}")
    if out is None:
        write_output(f"`onellm plan --here` and `--gpu {kind.kind}` use it now")
    return EXIT_DONE


def calibrate(device: torch.device, *, seconds: float, meter: DeviceMeter | None = None) -> GpuKind:
    """Measure a device.

    Args:
        device: the first GPU, or the CPU.
        seconds: of each measurement.
        meter: measures; default: a meter of the device.

    Returns:
        Its kind. What is not measured is that of the shipped or earlier file of the same device.
    """
    context = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Before this process has a context, all that is in use is that of others.
    others = ask_board(device, "memory.used") if device.type == "cuda" else None
    meter = meter or DeviceMeter(device, seconds=seconds)
    name = name_device(device)
    base = find_kind(name)
    found: dict[str, Any] = {
        "kind": _name_kind(device, name) if base is None else base.kind,
        "aliases": () if base is None else base.aliases,
        "device_names": (name.removeprefix("NVIDIA "),) if base is None else base.device_names,
        "date": time.strftime("%Y-%m-%d"),
        "sources": (f"measured on {name} with torch {torch.__version__}",),
    }
    if base is not None:  # of what is not measured
        found["sources"] += base.sources[1:] if base.measured else base.sources
    measured = _measure_memory(device, context)
    measured |= _measure_rates(meter, find_data_sheet(device, base))
    measured |= _measure_links(meter)
    measured["host"] = measure_host(meter)
    if device.type == "cuda":
        shipped = find_kind(name, shipped_only=True)
        least = 0.0 if shipped is None else shipped.context_gb
        in_use = measure_own_memory(device, MEBI * (others or 0.0))
        measured["context_gb"] = max(in_use / GIGA, least)  # the file counts NCCL's buffers too
    kept = _assume_links(measured) if base is None else base.model_dump()
    names = tuple(name for name in measured if name != "power_source")
    return GpuKind.model_validate(
        {**kept, **found, "shared": device.type == "cpu", **measured, "measured": names}
    )


def _name_kind(device: torch.device, name: str) -> str:
    """Processors are as different as GPUs are, and a home may be that of many machines."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.removeprefix("NVIDIA ").lower()).strip("-")
    return slug or device.type


def _measure_memory(device: torch.device, context: float) -> dict[str, Any]:
    """Memory of the device, what a process takes of it before a run, and the power of a board."""
    if device.type == "cpu":
        return {
            "memory_gb": psutil.virtual_memory().total / GIGA,
            "context_gb": context / GIGA,
        }
    torch.zeros(1, device=device)
    found: dict[str, Any] = {
        "memory_gb": torch.cuda.get_device_properties(device).total_memory / GIGA
    }
    watts = ask_board(device, "power.limit")
    if watts is not None:
        found |= {"board_watts": watts, "power_source": "nvidia-smi: the board's power limit"}
    return found


def ask_board(device: torch.device, field: str) -> float | None:
    """A number that `nvidia-smi` says of a GPU; None where it does not.

    Args:
        device: the GPU. Its UUID names it, since CUDA_VISIBLE_DEVICES numbers GPUs anew.
        field: watts that it may draw (`power.limit`), or MiB in use (`memory.used`).
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    query = [f"--id=GPU-{uuid}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=30, check=False
        )
        return float(done.stdout.strip()) or None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def find_data_sheet(device: torch.device, base: GpuKind | None) -> GpuKind | None:
    """The constants of a device if their peaks are those of a data sheet; else None.

    Peaks that an earlier calibration measured are not a bound of what the next one measures.
    """
    if device.type == "cpu" or base is None or "peak_tflops" in base.measured:
        return None
    return base


def _measure_rates(meter: DeviceMeter, base: GpuKind | None) -> dict[str, Any]:
    """Rates of matrix products, attention, convolution and memory.

    Args:
        meter: measures.
        base: has peaks of a data sheet, of which the rates are shares; None: the fastest matrix
            products are the peaks.
    """
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    products = {name: meter.measure_product(dtype) for name, dtype in dtypes.items()}
    peaks = (
        {name: rate / TERA for name, rate in products.items()}
        if base is None
        else dict(base.peak_tflops)
    )
    if base is None and choose_products(meter.device, torch.bfloat16)[0]:
        peaks[FLOAT8] = meter.measure_float8_product() / TERA
    usual = "bf16" if meter.device.type == "cuda" else "fp32"
    peak, dtype = peaks[usual] * TERA, dtypes[usual]
    thin = meter.measure_product(dtype, THIN)
    bandwidth = meter.measure_bandwidth()
    sheet = bandwidth if base is None else GIGA * base.bandwidth_gb_s
    found: dict[str, Any] = {
        "matmul_share": min(1.0, products[usual] / peak),
        "attention_share": min(1.0, meter.measure_attention(dtype) / peak),
        "convolution_share": min(1.0, meter.measure_convolution(dtype) / peak),
        "short_inner": max(0.0, THIN * (products[usual] / thin - 1)),
        "bandwidth_gb_s": sheet / GIGA,
        "bandwidth_share": min(1.0, bandwidth / sheet),
        "launch_us": MICRO * meter.measure_shortest_kernel(),
    }
    if base is None:
        found["peak_tflops"] = peaks
    else:
        del found["bandwidth_gb_s"]  # the data sheet's
    return found


def _measure_links(meter: DeviceMeter) -> dict[str, Any]:
    """Rates to the host and to a neighbouring device, where there is one."""
    neighbour = meter.measure_neighbour()
    found: dict[str, Any] = {"to_host_gb_s": meter.measure_to_host() / GIGA}
    if neighbour is not None:
        found["node_bus_gb_s"] = neighbour / GIGA
    return found


def _assume_links(measured: dict[str, Any]) -> dict[str, Any]:
    """Links that one device alone cannot measure, of a kind that nothing is known of."""
    bus = measured.get("node_bus_gb_s", measured["to_host_gb_s"])
    return {"node_bus_gb_s": bus, "node_network_gb_s": bus, "network_share": 1.0}


def measure_own_memory(device: torch.device, others: float) -> float:
    """Bytes of a GPU that this process has beside those of torch's allocator.

    Args:
        device: the GPU.
        others: bytes that were in use before this process had a context there.
    """
    free, total = torch.cuda.mem_get_info(device)
    return max(0.0, total - free - torch.cuda.memory_reserved(device) - others)


def measure_host(meter: DeviceMeter) -> HostAssumption:
    """Host time of calls and modules, by the toy model on a micro-batch of a few tokens."""
    model, batch, count = _make_tiny(meter.device)
    call = meter.measure_call()
    forward, backward = meter.measure_passes(lambda: _compute_loss(model, batch))
    python = max(0.0, forward - call * count.calls["forward"]) / count.modules["forward"]
    assumed = load_assumptions().host
    return HostAssumption(
        call_us=MICRO * call,
        module_us=max(1e-3, MICRO * python),
        backward_call_us=MICRO * backward / count.calls["backward"],
        step_ms=assumed.step_ms,
    )


def _make_tiny(device: torch.device) -> tuple[Any, PackedBatch, PackCount]:
    """The toy model, a micro-batch of one text, and what that does."""
    config = build_config("toy")
    modalities = list(get_modalities(config).values())
    shape = make_meta_batch(TINY, modalities)
    model: Any = build_model(config)
    count = count_pack(model.train(), shape)
    with torch.no_grad():
        model.to_empty(device=device)
        for parameter in model.parameters():
            parameter.fill_(0.01)
        for buffer in model.buffers():
            buffer.zero_()
    ids = torch.arange(3, 3 + TINY[0].text_tokens, device=device)
    labels = ids.clone()
    labels[0] = IGNORE
    batch = replace(
        shape,
        input_ids=ids,
        labels=labels,
        values={
            name: torch.zeros(value.shape, dtype=value.dtype, device=device)
            for name, value in shape.values.items()
        },
        weights=torch.ones(1, device=device),
        supervised=torch.arange(1, TINY[0].text_tokens, device=device),
    )
    return model, batch, count


def _compute_loss(model: Any, batch: PackedBatch) -> torch.Tensor:
    loss: torch.Tensor = model(packed=batch).loss
    return loss


def format_kind(kind: GpuKind, name: str) -> str:
    """A calibration file."""
    values = kind.model_dump(mode="json", exclude_none=True)
    rounded = _round(values)
    return f"# {name}: written by `onellm plan --calibrate`.\n{dump_yaml(rounded)}"


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    return value


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, HostAssumption):
        value = value.model_dump()
    if isinstance(value, dict):
        return ", ".join(f"{key} {_format(item)}" for key, item in value.items())
    return "not known" if value is None else str(value)
