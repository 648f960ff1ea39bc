"""Checks of this machine: GPUs, CPU, memory, limits, shared memory and disk."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from onellm_dist.diagnostics.check_result import GIB, CheckResult
from onellm_dist.diagnostics.nccl import get_nccl_version
from onellm_dist.train.engine.select import all_engines

ENOUGH_OPEN_FILES = 4096
ENOUGH_DISK = 5 * GIB


def check_devices() -> Iterator[CheckResult]:
    """GPUs as torch sees them, and what the CPU is good for."""
    import torch

    if torch.cuda.is_available():
        yield from _check_gpus()
    elif shutil.which("nvidia-smi") and _lists_gpus():
        yield CheckResult(
            "devices",
            "GPU",
            "fail",
            "nvidia-smi lists GPUs, but torch cannot use them",
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}: update the "
            "driver, or install a matching torch.",
        )
    else:
        yield CheckResult("devices", "GPU", "note", "none: ranks run on the CPU and use gloo")
    cores = len(os.sched_getaffinity(0))
    flags = sorted(_get_cpu_flags() & {"avx512_bf16", "amx_bf16"})
    bf16 = "no bf16 in hardware: use train.precision=fp32 on the CPU"
    if flags:
        bf16 = f"bf16 in hardware ({', '.join(flags)})"
    yield CheckResult("devices", "CPU", "ok", f"{cores} of {os.cpu_count()} cores usable, {bf16}")


def _check_gpus() -> Iterator[CheckResult]:
    import torch

    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield CheckResult(
            "devices",
            f"GPU {index}",
            "ok",
            f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute {gpu.major}.{gpu.minor}, "
            f"CUDA {torch.version.cuda}",
        )
    version = get_nccl_version()
    if version:
        yield CheckResult("devices", "NCCL", "ok", version)
    else:
        yield CheckResult(
            "devices",
            "NCCL",
            "fail",
            "torch has none",
            "install torch's CUDA build: ranks on GPUs cannot communicate without NCCL.",
        )


def _lists_gpus() -> bool:
    command = ["nvidia-smi", "-L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip().startswith("GPU")


def check_host() -> Iterator[CheckResult]:
    """Memory, open files, threads, and whether the host can find its own address."""
    memory = psutil.virtual_memory()
    free = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    yield CheckResult("host", "memory", "ok", free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < ENOUGH_OPEN_FILES:
        yield CheckResult(
            "host",
            "open files",
            "warn",
            f"at most {soft}",
            f"ulimit -n {min(hard, 65536)}: loader workers keep many shards open.",
        )
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield CheckResult(
            "host",
            "name",
            "fail",
            f"{name} has no address ({error}): ranks cannot find each other",
            f"add {name} to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.",
        )
    else:
        yield CheckResult("host", "name", "ok", f"{name} is {address}")
    threads = os.environ.get("OMP_NUM_THREADS")
    yield CheckResult(
        "host", "OMP_NUM_THREADS", "note", threads or "not set: launchers set it for their ranks"
    )


def check_shared_memory(folder: Path) -> CheckResult:
    """Free space in shared memory, and files that killed ranks have left in it.

    Args:
        folder: `/dev/shm`; a test may pass its own.
    """
    if not folder.is_dir():
        return CheckResult(
            "host",
            str(folder),
            "warn",
            "not there",
            "mount a tmpfs: NCCL connects the GPUs of a node through it.",
        )
    patterns = [e.shared_memory_pattern for e in all_engines().values() if e.shared_memory_pattern]
    left = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    mapped = _find_mapped_files(folder) if left else set()
    left = [path for path in left if str(path) not in mapped]
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free"
    if left:
        size = sum(path.stat().st_blocks * 512 for path in left) / GIB
        buffers = "1 buffer" if len(left) == 1 else f"{len(left)} buffers"
        return CheckResult(
            "host",
            str(folder),
            "warn",
            f"{detail}; {buffers} ({size:.2f} GiB) left by ranks that ended",
            f"rm {' '.join(f'{folder}/{pattern}' for pattern in patterns)} while no CPU rank runs.",
        )
    if free < GIB:
        return CheckResult(
            "host",
            str(folder),
            "warn",
            detail,
            "docker run --shm-size=8g or larger: NCCL connects the GPUs of a node through it.",
        )
    return CheckResult("host", str(folder), "ok", detail)


def check_disk(folder: Path) -> CheckResult:
    """Free space where runs are written by default.

    Args:
        folder: any folder of the disk.
    """
    free = shutil.disk_usage(folder).free
    if free < ENOUGH_DISK:
        return CheckResult(
            "host",
            "disk",
            "warn",
            f"{free / GIB:.1f} GiB free at {folder}",
            "set run.dir to a larger disk: a checkpoint of a 7B run takes about 6 GiB in align "
            "and 80 GiB in tune.",
        )
    return CheckResult("host", "disk", "ok", f"{free / GIB:.0f} GiB free at {folder}")


def _find_mapped_files(folder: Path) -> set[str]:
    """Files below `folder` that a living process has mapped."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines = (process / "maps").read_text(errors="replace").splitlines()
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
        found |= {
            fields[5]
            for line in lines
            if len(fields := line.split(None, 5)) == 6 and fields[5].startswith(f"{folder}/")
        }
    return found


def _get_cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = (line.split(":", 1)[1] for line in text.splitlines() if line.startswith("flags"))
    return set(next(lines, "").split())
