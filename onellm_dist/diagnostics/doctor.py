"""`onellm doctor`: what this machine has, and what would break or slow a training run on it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError
from onellm_dist.train.engine.select import all_engines

State = Literal["ok", "note", "warn", "fail"]
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: `fail` would break training (exit code 1), `warn` may slow or hinder it, `note` is for the reader.
        do: what to do about a `warn` or `fail`.
    """

    part: str
    name: str
    state: State
    detail: str
    do: str = ""


def run_doctor() -> int:
    """Print every finding: a table on a terminal, plain lines elsewhere.

    Returns:
        0, or 1 where something would break training.
    """
    findings = list(examine())
    print_findings(findings)
    failures = sum(f.state == "fail" for f in findings)
    warnings = sum(f.state == "warn" for f in findings)
    print(
        f"{failures} would break training, {warnings} to know about."
        if failures or warnings
        else "Nothing stands in the way of training."
    )
    return EXIT_FAILED if failures else EXIT_DONE


def examine() -> Iterator[Finding]:
    """Every finding, in the order of the report."""
    yield from check_packages()
    yield from check_torchaudio()
    yield from check_imports()
    yield from check_devices()
    yield check_attention()
    yield from check_launchers()
    yield from check_host()
    yield check_shared_memory(Path("/dev/shm"))
    yield check_disk(Path.cwd())


def check_packages(requirements: Iterable[str] | None = None) -> Iterator[Finding]:
    """Versions of the packages that setup.cfg requires, against the ranges there."""
    yield Finding("packages", "python", "ok", f"{platform.python_version()} at {sys.executable}")
    if requirements is None:
        requirements = importlib.metadata.requires("onellm-dist") or []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("packages", name, "fail", "not installed", f"pip install '{requirement}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding("packages", name, "ok", version)
        else:
            yield Finding(
                "packages",
                name,
                "fail",
                f"{version}, but {wanted} is needed",
                f"pip install '{requirement}'",
            )


def check_torchaudio(
    version: Callable[[str], str] = importlib.metadata.version,
) -> Iterator[Finding]:
    """Torchaudio ended with 2.11: beside a newer torch its libraries do not load, and transformers' LLaMA imports it where installed."""
    try:
        audio, torch = version("torchaudio"), version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    if audio.split(".")[:2] != torch.split(".")[:2]:
        yield Finding(
            "packages",
            "torchaudio",
            "fail",
            f"{audio} beside torch {torch}: transformers' LLaMA imports it and breaks",
            "pip uninstall torchaudio: onellm_dist computes its spectrograms without it.",
        )


def check_imports(load: Callable[[str], object] = importlib.import_module) -> Iterator[Finding]:
    """Imports that are known to fail with versions that do not fit each other."""
    traps = {
        "torchvision": "open_clip and transformers import it: install torch and torchvision from one index, not a CPU-only torch.",
        "torchaudio": "onellm_dist does not need it, and transformers' LLaMA imports it where installed: pip uninstall torchaudio.",
        "transformers.models.llama.modeling_llama": "the LLM cannot be built: mend the import that the message names.",
        "open_clip": "the encoder's weights come through it: mend the import that the message names.",
        "av": "videos cannot be read: pip install av.",
        "soundfile": "sounds cannot be read: pip install soundfile (its wheel brings libsndfile).",
    }
    for module, do in traps.items():
        try:
            load(module)
        except ModuleNotFoundError as error:
            if module != "torchaudio" or error.name != module:
                yield Finding("imports", module, "fail", _first_line(error), do)
        except Exception as error:  # a broken binary package raises anything (RuntimeError, OSError, AttributeError)
            yield Finding(
                "imports", module, "fail", f"{type(error).__name__}: {_first_line(error)}", do
            )
        else:
            yield Finding("imports", module, "ok", "imports")


def check_devices() -> Iterator[Finding]:
    """GPUs as torch sees them, else the CPU and what it is good for."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and _output(["nvidia-smi", "-L"]).startswith("GPU"):
            do = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}: update the driver, or install a matching torch."
            yield Finding(
                "devices", "GPU", "fail", "nvidia-smi lists GPUs, but torch cannot use them", do
            )
        else:
            yield Finding(
                "devices",
                "GPU",
                "note",
                "none: training runs on the CPU, with gloo",
            )
    else:
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            detail = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, compute {facts.major}.{facts.minor}"
            yield Finding("devices", f"GPU {index}", "ok", f"{detail}, CUDA {torch.version.cuda}")
        version = (
            ".".join(str(v) for v in torch.cuda.nccl.version())
            if torch.distributed.is_nccl_available()
            else ""
        )
        if version:
            yield Finding("devices", "NCCL", "ok", version)
        else:
            yield Finding(
                "devices",
                "NCCL",
                "fail",
                "torch has none",
                "install torch's CUDA build: ranks on GPUs cannot talk without NCCL.",
            )
    cores = len(os.sched_getaffinity(0))
    flags = {flag for flag in ("avx512_bf16", "amx_bf16") if flag in _cpu_flags()}
    bf16 = (
        f"bf16 in hardware ({', '.join(sorted(flags))})"
        if flags
        else "no bf16 in hardware: use train.precision=fp32 on the CPU"
    )
    yield Finding("devices", "CPU", "ok", f"{cores} of {os.cpu_count()} cores usable, {bf16}")


def check_attention() -> Finding:
    """The attention backend for packed sequences, and why it was picked."""
    import torch

    from onellm_dist.model.kernels.select import select_backend

    try:
        name, reason = select_backend()
    except OneLLMError as error:
        return Finding("attention", "backend", "fail", error.what, error.do)
    if name == "sdpa" and torch.cuda.is_available():
        return Finding(
            "attention",
            "backend",
            "warn",
            f"{name}: {reason}",
            "install flash-attn, or torch >= 2.11: packed attention is slow here.",
        )
    return Finding("attention", "backend", "ok", f"{name}: {reason}")


def check_launchers(path: str | None = None) -> Iterator[Finding]:
    """What can start ranks here: deepspeed, torchrun, pdsh, Slurm."""
    beside = os.pathsep.join(
        p for p in (str(Path(sys.executable).parent), path or os.environ.get("PATH", "")) if p
    )
    for name in ("deepspeed", "torchrun"):
        found = shutil.which(name, path=beside)
        if found:
            yield Finding("launchers", name, "ok", found)
        else:
            yield Finding(
                "launchers",
                name,
                "fail",
                "not found",
                f"pip install {'torch' if name == 'torchrun' else name}",
            )
    pdsh = shutil.which("pdsh", path=beside)
    yield Finding(
        "launchers",
        "pdsh",
        "ok" if pdsh else "note",
        pdsh or "not found: only for the deepspeed launcher over several nodes",
    )
    srun = shutil.which("srun", path=beside)
    if not srun:
        yield Finding("launchers", "Slurm", "note", "not found: no srun here")
        return
    job = os.environ.get("SLURM_JOB_ID")
    version = _output([srun, "--version"]) or "version unknown"
    yield Finding(
        "launchers", "Slurm", "ok", f"{version}, {'job ' + job if job else 'not inside a job'}"
    )


def check_host() -> Iterator[Finding]:
    """Memory, open files, threads, and whether the host can find itself."""
    memory = psutil.virtual_memory()
    yield Finding(
        "host", "memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        yield Finding(
            "host",
            "open files",
            "warn",
            f"at most {soft}",
            f"ulimit -n {min(hard, 65536)}: loader workers hold many shards open.",
        )
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        do = f"add {name} to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
        yield Finding(
            "host",
            "name",
            "fail",
            f"{name} has no address ({error}): ranks cannot find each other",
            do,
        )
    else:
        yield Finding("host", "name", "ok", f"{name} is {address}")
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding(
        "host", "OMP_NUM_THREADS", "note", threads or "not set: launchers set it for their ranks"
    )


def check_shared_memory(folder: Path) -> Finding:
    """Free space, and the buffers that killed ranks left behind."""
    if not folder.is_dir():
        return Finding(
            "host",
            str(folder),
            "warn",
            "not there",
            "mount a tmpfs: loader workers and CPU ranks share memory through it.",
        )
    patterns = [e.shared_memory_pattern for e in all_engines().values() if e.shared_memory_pattern]
    left = [p for pattern in patterns for p in folder.glob(pattern) if p.is_file()]
    mapped = _mapped_files(folder) if left else set()
    left = [p for p in left if str(p) not in mapped]
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free"
    if left:
        size = sum(p.stat().st_blocks * 512 for p in left)
        names = " ".join(f"{folder}/{pattern}" for pattern in patterns)
        do = f"rm {names} while no CPU rank runs."
        return Finding(
            "host",
            str(folder),
            "warn",
            f"{detail}; {len(left)} buffers ({size / GIB:.2f} GiB) of ranks that were killed",
            do,
        )
    if free < GIB:
        return Finding(
            "host",
            str(folder),
            "warn",
            detail,
            "docker run --shm-size=8g or larger: loader workers pass batches through it.",
        )
    return Finding("host", str(folder), "ok", detail)


def check_disk(folder: Path) -> Finding:
    """Free space where runs are written by default."""
    free = shutil.disk_usage(folder).free
    if free < 5 * GIB:
        do = "set run.dir to a larger disk: a 7B run's checkpoint is about 6 GiB in align and 80 GiB in tune."
        return Finding("host", "disk", "warn", f"{free / GIB:.1f} GiB free at {folder}", do)
    return Finding("host", "disk", "ok", f"{free / GIB:.0f} GiB free at {folder}")


def print_findings(findings: Iterable[Finding]) -> None:
    """A rich table on a terminal; `[state] part: name: detail` lines, each remedy below its line, elsewhere."""
    if not sys.stdout.isatty():
        for f in findings:
            print(f"[{f.state:4}] {f.part}: {f.name}: {f.detail}")
            if f.do:
                print(f"       -> {f.do}")
        return
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "note": "dim", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, pad_edge=False)
    for heading in ("", "part", "what", "found"):
        table.add_column(heading)
    for f in findings:
        table.add_row(
            f"[{colours[f.state]}]{f.state}[/]",
            f.part,
            f.name,
            f.detail + (f"\n-> {f.do}" if f.do else ""),
        )
    Console().print(table)


def _mapped_files(folder: Path) -> set[str]:
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


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    return set(
        next(
            (line.split(":", 1)[1] for line in text.splitlines() if line.startswith("flags")), ""
        ).split()
    )


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
