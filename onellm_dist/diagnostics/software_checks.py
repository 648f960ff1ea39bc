"""Checks of packages, imports, the attention kernel and launchers."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.errors import OneLLMError
from onellm_dist.diagnostics.check_result import CheckResult
from onellm_dist.launch.slurm.job import STARTERS

IMPORT_REMEDIES = {
    "torchvision": "open_clip and transformers import it: install torch and torchvision from one "
    "index, not a CPU-only torch.",
    "torchaudio": "onellm_dist does not need it, but transformers' LLaMA imports it if it is "
    "installed: pip uninstall torchaudio.",
    "transformers.models.llama.modeling_llama": "the LLM cannot be built: fix the import that the "
    "message names.",
    "open_clip": "the encoder's weights are loaded through it: fix the import that the message "
    "names.",
    "av": "videos cannot be read: pip install av.",
    "soundfile": "sounds cannot be read: pip install soundfile (its wheel includes libsndfile).",
}
"""Modules that are known to fail with versions that do not fit each other, and what to do then."""


def check_packages(requirements: Iterable[str] | None = None) -> Iterator[CheckResult]:
    """Compare installed versions with the ranges that setup.cfg requires.

    Args:
        requirements: as pip writes them; default: those of onellm-dist.
    """
    python = f"{platform.python_version()} at {sys.executable}"
    yield CheckResult("packages", "python", "ok", python)
    if requirements is None:
        requirements = importlib.metadata.requires("onellm-dist") or []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _check_requirement(requirement)


def _check_requirement(requirement: Requirement) -> CheckResult:
    name = requirement.name
    remedy = f"pip install '{requirement}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return CheckResult("packages", name, "fail", "not installed", remedy)
    if requirement.specifier.contains(version, prereleases=True):
        return CheckResult("packages", name, "ok", version)
    detail = f"{version}, but {requirement.specifier} is needed"
    return CheckResult("packages", name, "fail", detail, remedy)


def check_torchaudio(
    version: Callable[[str], str] = importlib.metadata.version,
) -> Iterator[CheckResult]:
    """Find a torchaudio that does not belong to the installed torch.

    Torchaudio ended with 2.11. Beside a newer torch its libraries do not load, and transformers'
    LLaMA imports it if it is installed.

    Args:
        version: package name -> installed version; a test may pass its own.
    """
    try:
        audio = version("torchaudio")
        torch = version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    if audio.split(".")[:2] != torch.split(".")[:2]:
        yield CheckResult(
            "packages",
            "torchaudio",
            "fail",
            f"{audio} beside torch {torch}: transformers' LLaMA imports it and breaks",
            "pip uninstall torchaudio: onellm_dist computes its spectrograms without it.",
        )


def check_imports(
    load: Callable[[str], object] = importlib.import_module,
) -> Iterator[CheckResult]:
    """Import the modules that are known to fail.

    Args:
        load: imports a module; a test may pass its own.
    """
    for module, remedy in IMPORT_REMEDIES.items():
        try:
            load(module)
        except ModuleNotFoundError as error:
            if module != "torchaudio" or error.name != module:
                yield CheckResult("imports", module, "fail", get_first_line(error), remedy)
        except Exception as error:  # a broken binary package may raise anything
            detail = f"{type(error).__name__}: {get_first_line(error)}"
            yield CheckResult("imports", module, "fail", detail, remedy)
        else:
            yield CheckResult("imports", module, "ok", "imports")


def check_attention() -> CheckResult:
    """The attention backend for packed sequences, why it was chosen, and the kernel that ran."""
    import torch

    from onellm_dist.model.kernel_trace import trace_attention
    from onellm_dist.model.kernels.select import select_backend

    try:
        name, reason = select_backend()
    except OneLLMError as error:
        return CheckResult("attention", "backend", "fail", error.what, error.do)
    has_gpu = torch.cuda.is_available()
    try:
        ran = trace_attention(
            torch.device("cuda" if has_gpu else "cpu"),
            dtype=torch.bfloat16,
            head_width=64,
            causal=False,
            with_kernels=True,
        )
    except RuntimeError as error:
        detail = f"{name} fails: {get_first_line(error)}"
        return CheckResult(
            "attention", "backend", "fail", detail, "choose another one by ONELLM_ATTENTION=sdpa."
        )
    detail = f"{name}: {reason}; it runs {ran}"
    if name == "sdpa" and has_gpu:
        return CheckResult(
            "attention",
            "backend",
            "warn",
            detail,
            "install flash-attn, or torch >= 2.11: packed attention is slow here.",
        )
    if "cudnn" in str(ran).lower():
        return CheckResult(
            "attention",
            "backend",
            "warn",
            detail,
            "cuDNN builds a graph for every new shape of a pack; set ONELLM_ATTENTION=flash2.",
        )
    return CheckResult("attention", "backend", "ok", detail)


def check_kernels() -> CheckResult:
    """What `train.kernels=auto` runs here, tried out where it is fused."""
    import torch

    from onellm_dist.model.kernels.pointwise import CompiledBody
    from onellm_dist.model.model_kernels import choose_kernels, try_fused_kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fused, reason = choose_kernels("auto", device.type)
    if not fused:
        return CheckResult("kernels", "train.kernels=auto", "ok", f"plain: {reason}")
    try:
        ran = try_fused_kernels(device, torch.bfloat16)
    except RuntimeError as error:
        detail = f"fused kernels fail: {get_first_line(error)}"
        return CheckResult(
            "kernels", "train.kernels=auto", "fail", detail, "set train.kernels=plain."
        )
    detail = "fused: " + ", ".join(f"{name} by {what}" for name, what in ran.items())
    if CompiledBody.failure:
        remedy = "install a C compiler: inductor needs one."
        return CheckResult("kernels", "train.kernels=auto", "warn", detail, remedy)
    return CheckResult("kernels", "train.kernels=auto", "ok", detail)


def check_float8() -> CheckResult:
    """What `engine.frozen_weights=fp8` does here, tried out where products are of float8."""
    import torch

    from onellm_dist.model.quantised.float8 import describe_products, try_products

    what = "kernels", "engine.frozen_weights=fp8"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        try_products(device, torch.bfloat16)
    except RuntimeError as error:
        detail = f"float8 products fail: {get_first_line(error)}"
        return CheckResult(*what, "warn", detail, "keep engine.frozen_weights=plain.")
    return CheckResult(*what, "ok", describe_products(device, torch.bfloat16))


def check_launchers(path: str | None = None) -> Iterator[CheckResult]:
    """Find what can start ranks here.

    Args:
        path: folders to look in, beside the interpreter's; default: `PATH`.
    """
    folders = [str(Path(sys.executable).parent), path or os.environ.get("PATH", "")]
    search_path = os.pathsep.join(folder for folder in folders if folder)
    for name in STARTERS:
        if name == "srun":
            continue
        program = shutil.which(name, path=search_path)
        if program:
            yield CheckResult("launchers", name, "ok", program)
        else:
            remedy = f"pip install {'torch' if name == 'torchrun' else name}"
            yield CheckResult("launchers", name, "fail", "not found", remedy)
    pdsh = shutil.which("pdsh", path=search_path)
    yield CheckResult(
        "launchers",
        "pdsh",
        "ok" if pdsh else "note",
        pdsh or "not found: only --with deepspeed on several nodes needs it",
    )
    srun = shutil.which("srun", path=search_path)
    if not srun:
        yield CheckResult("launchers", "Slurm", "note", "srun not found")
        return
    job = os.environ.get("SLURM_JOB_ID")
    version = _get_output([srun, "--version"]) or "version unknown"
    place = f"job {job}" if job else "not inside a job"
    yield CheckResult("launchers", "Slurm", "ok", f"{version}, {place}")


def _get_output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
