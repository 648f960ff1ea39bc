"""What must be the same on every node: interpreter, libraries, our code, and the environment that libraries read."""

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
from onellm_dist.diagnostics.preflight.options import Pretence
from onellm_dist.train.engine.select import all_engines

PACKAGES = tuple(
    dict.fromkeys(
        ("torch", *(p for e in all_engines().values() for p in e.packages))
        + ("transformers", "numpy", "onellm-dist")
    )
)
WATCHED = (
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "OMP_",
    "CUDA_LAUNCH",
    "PYTORCH_",
    "HF_",
    "UCX_",
    "FI_",
    *(prefix for engine in all_engines().values() for prefix in engine.environment_prefixes),
)
"""Prefixes of variables that change how ranks talk or compute."""
PER_NODE = ("TORCHELASTIC_", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Of those, what may differ between nodes by right."""


def versions(pretence: Pretence) -> dict[str, str]:
    """Name -> version; a package that is not there is `none`."""
    found = {"python": platform.python_version(), "onellm_dist's code": code_digest()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    found["git commit"] = git_commit()
    import torch

    found["torch"] = pretence.torch or torch.__version__
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        if torch.distributed.is_nccl_available():
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The watched variables."""
    return {
        k: v for k, v in sorted(env.items()) if k.startswith(WATCHED) and not k.startswith(PER_NODE)
    }


def code_digest(package: Path | None = None) -> str:
    """Twelve digits that change with any source file of the package: a node with an older copy is found without git."""
    package = Path(onellm_dist.__file__).parent if package is None else package
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(
            path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()[:12]


def git_commit() -> str:
    """The checkout's commit, or `none` where the package was installed."""
    command = [
        "git",
        "-C",
        str(Path(onellm_dist.__file__).parent),
        "rev-parse",
        "--short=12",
        "HEAD",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"


def odd_ones(by_node: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Name -> value -> nodes, for every name whose value is not the same on all nodes; the commonest value first."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted({name for values in by_node.values() for name in values}):
        groups: dict[str, list[str]] = {}
        for node, values in by_node.items():
            groups.setdefault(str(values.get(name, "not set")), []).append(node)
        if len(groups) > 1:
            found[name] = dict(sorted(groups.items(), key=lambda item: -len(item[1])))
    return found
