"""What must be the same on every node: interpreter, libraries, our code, and the environment."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onellm_dist
from onellm_dist.common.secrets import mask_environment
from onellm_dist.diagnostics.nccl import get_nccl_version
from onellm_dist.diagnostics.preflight.options import SimulatedFaults
from onellm_dist.train.engine.select import all_engines

PACKAGES = ("torch", "transformers", "numpy", "onellm-dist")
"""Packages whose versions must agree, beside those of the engines."""
PREFIXES = (
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "OMP_",
    "CUDA_LAUNCH",
    "PYTORCH_",
    "HF_",
    "UCX_",
    "FI_",
)
"""Prefixes of variables that change how ranks communicate or compute, beside those of the
engines."""
PER_NODE = ("TORCHELASTIC_", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Variables with these prefixes that may differ between nodes."""


def get_versions(simulated: SimulatedFaults) -> dict[str, str]:
    """Name -> version; `none` for a package that is not installed."""
    import torch

    versions = {"python": platform.python_version(), "onellm_dist's code": compute_code_digest()}
    engines = [name for engine in all_engines().values() for name in engine.packages]
    for name in dict.fromkeys((*PACKAGES, *engines)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    versions["git commit"] = get_git_commit()
    versions["torch"] = simulated.torch or torch.__version__
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
        if nccl := get_nccl_version():
            versions["NCCL"] = nccl
    return versions


def get_environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that should be the same on all nodes; secrets are masked."""
    engines = [name for engine in all_engines().values() for name in engine.environment_prefixes]
    prefixes = (*PREFIXES, *engines)
    return mask_environment(
        {
            name: value
            for name, value in sorted(env.items())
            if name.startswith(prefixes) and not name.startswith(PER_NODE)
        }
    )


def compute_code_digest(package: Path | None = None) -> str:
    """Twelve hex digits that change with any source file of the package.

    They find a node with an older copy without git.

    Args:
        package: a folder; default: this package's.
    """
    package = Path(onellm_dist.__file__).parent if package is None else package
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix().encode()
        digest.update(name + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def get_git_commit() -> str:
    """The checkout's commit, or `none` if the package was installed."""
    folder = str(Path(onellm_dist.__file__).parent)
    command = ["git", "-C", folder, "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"


def find_differences(
    by_node: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, list[str]]]:
    """Names whose value is not the same on all nodes.

    Returns:
        Name -> value -> nodes, the most common value first.
    """
    differences: dict[str, dict[str, list[str]]] = {}
    for name in sorted({name for values in by_node.values() for name in values}):
        groups: dict[str, list[str]] = {}
        for node, values in by_node.items():
            groups.setdefault(str(values.get(name, "not set")), []).append(node)
        if len(groups) > 1:
            differences[name] = dict(sorted(groups.items(), key=lambda item: -len(item[1])))
    return differences
