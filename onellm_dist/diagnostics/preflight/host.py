"""What a node has: memory, shared memory, open files, GPUs."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from onellm_dist.diagnostics.preflight.options import SimulatedFaults

MATMUL_SIZE = 8192
ECC_FIELDS = (
    "index",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "temperature.gpu",
)


def get_host_facts(simulated: SimulatedFaults) -> dict[str, Any]:
    """Bytes of memory and shared memory (None without /dev/shm), open files allowed, cores."""
    memory = psutil.virtual_memory()
    shm = Path("/dev/shm")
    shm_free = None
    if shm.is_dir():
        shm_free = simulated.free_bytes
        if shm_free is None:
            shm_free = shutil.disk_usage(shm).free
    return {
        "memory_free": memory.available,
        "memory_total": memory.total,
        "shm_free": shm_free,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "cores": len(os.sched_getaffinity(0)),
    }


def get_gpu_facts(local_rank: int) -> dict[str, Any] | None:
    """This rank's GPU: name, bytes, FLOP/s of a product, and whether two products agree.

    Returns:
        None without GPUs; `missing` is true if the node has fewer GPUs than ranks.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    index = get_gpu_index(local_rank)
    if index >= count:
        return {"missing": True, "count": count}
    torch.cuda.set_device(index)
    free, total = torch.cuda.mem_get_info()
    flops, same = measure_product(torch.device("cuda", index), MATMUL_SIZE, torch.bfloat16)
    return {
        "missing": False,
        "count": count,
        "name": torch.cuda.get_device_name(),
        "free": free,
        "total": total,
        "flops": flops,
        "repeatable": same,
        "uuid": str(getattr(torch.cuda.get_device_properties(index), "uuid", "")),
    }


def get_gpu_index(local_rank: int) -> int:
    """This rank's GPU among those that its process sees.

    With --gpus-per-task a process sees only its own one.
    """
    import torch

    return 0 if torch.cuda.device_count() == 1 else local_rank


def measure_product(device: Any, size: int, dtype: Any, rounds: int = 8) -> tuple[float, bool]:
    """FLOP/s of a matrix product [size, size], and whether it gives the same bits twice.

    A faulty GPU may not repeat itself.
    """
    import torch

    generator = torch.Generator(device="cpu").manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    first = a @ a
    best = float("inf")
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        again = a @ a
        _wait(device)
        best = min(best, time.perf_counter() - started)
    same = bool(torch.equal(first, again)) and bool(torch.isfinite(first).all())
    return 2 * size**3 / best, same


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def get_ecc_facts() -> list[dict[str, str]]:
    """What nvidia-smi reports about each GPU's memory errors; [] if it reports nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ECC_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_ecc(done.stdout) if done.returncode == 0 else []


def parse_ecc(text: str) -> list[dict[str, str]]:
    """`0, 0, No, 41` -> its fields by name; fields that the GPU does not have are left out."""
    gpus = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(ECC_FIELDS):
            fields = zip(ECC_FIELDS, values, strict=True)
            gpus.append({k: v for k, v in fields if v and not v.startswith(("[", "N/A"))})
    return gpus
