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

from onellm_dist.diagnostics.preflight.options import Pretence

MATMUL_CPU, MATMUL_GPU = 512, 8192
ECC_FIELDS = (
    "index",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "temperature.gpu",
)


def host_facts(pretence: Pretence) -> dict[str, Any]:
    """Bytes of memory and shared memory (`None` where there is no /dev/shm), open files allowed, cores."""
    memory = psutil.virtual_memory()
    shm = Path("/dev/shm")
    return {
        "memory_free": memory.available,
        "memory_total": memory.total,
        "shm_free": _free(shm, pretence) if shm.is_dir() else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "cores": len(os.sched_getaffinity(0)),
    }


def _free(path: Path, pretence: Pretence) -> int:
    return shutil.disk_usage(path).free if pretence.free_bytes is None else pretence.free_bytes


def gpu_facts(local_rank: int) -> dict[str, Any] | None:
    """This rank's GPU: name, bytes, FLOP/s of a product, and whether two products agree; None without GPUs.

    `missing` is true where the node has fewer GPUs than ranks.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    count, index = torch.cuda.device_count(), gpu_index(local_rank)
    if index >= count:
        return {"missing": True, "count": count}
    torch.cuda.set_device(index)
    free, total = torch.cuda.mem_get_info()
    flops, same = product(torch.device("cuda", index), MATMUL_GPU, torch.bfloat16)
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


def gpu_index(local_rank: int) -> int:
    """This rank's GPU among those that its process sees: its own, or the only one where each task is shown one (--gpus-per-task)."""
    import torch

    return 0 if torch.cuda.device_count() == 1 else local_rank


def product(device: Any, size: int, dtype: Any, rounds: int = 8) -> tuple[float, bool]:
    """FLOP/s of a matrix product [size, size], and whether it gives the same bits twice (a sick GPU may not)."""
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
    return 2 * size**3 / best, bool(torch.equal(first, again)) and bool(torch.isfinite(first).all())


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ecc_facts() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU's memory errors; [] where it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ECC_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_ecc(done.stdout) if done.returncode == 0 else []


def parse_ecc(text: str) -> list[dict[str, str]]:
    """`0, 0, No, 41` -> its fields by name; fields that the GPU does not have are left out."""
    found = []
    for line in text.splitlines():
        values = [v.strip() for v in line.split(",")]
        if len(values) == len(ECC_FIELDS):
            found.append(
                {
                    k: v
                    for k, v in zip(ECC_FIELDS, values, strict=True)
                    if v and not v.startswith(("[", "N/A"))
                }
            )
    return found
