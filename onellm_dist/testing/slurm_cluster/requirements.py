"""What a throw-away Slurm needs of this machine: tools, and the right to make namespaces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from onellm_dist.common.errors import OneLLMError
from onellm_dist.testing.slurm_cluster.namespaces import UNSHARE

PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
"""Tool to Debian package."""
SSH_PACKAGES = {
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
}
"""Tool to Debian package, for the deepspeed launcher."""
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""Daemons are often outside a user's PATH."""


def find_tool(name: str) -> str:
    """Find the path of a tool.

    Raises:
        OneLLMError: it is not installed.
    """
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise OneLLMError(
            f"{name} is not installed",
            "a throw-away Slurm needs it.",
            f"install the package {({**PACKAGES, **SSH_PACKAGES})[name]}.",
        )
    return found


def find_missing(*, ssh: bool = False) -> str:
    """Find out why no throw-away Slurm can run here.

    Args:
        ssh: whether its nodes have to accept ssh.

    Returns:
        The reason, or "" if one can run.
    """
    if not sys.platform.startswith("linux"):
        return "Linux is needed (its namespaces)"
    tools = {**PACKAGES, **(SSH_PACKAGES if ssh else {})}
    missing = {package for tool, package in tools.items() if not shutil.which(tool, path=_PATH)}
    if missing:
        return f"Debian packages are missing: {' '.join(sorted(missing))}"
    if os.geteuid() != 0:
        return "root is needed, for namespaces and Slurm's daemons"
    tried = subprocess.run(
        [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if tried.returncode == 0:
        return ""
    return f"namespaces are not permitted here ({tried.stderr.strip()})"


def check_requirements(*, ssh: bool = False) -> None:
    """Refuse a machine on which no throw-away Slurm can run.

    Args:
        ssh: whether its nodes have to accept ssh.

    Raises:
        OneLLMError: something is missing; the error says what, and how to get it.
    """
    missing = find_missing(ssh=ssh)
    if not missing:
        return
    remedy = "run as root, in a virtual machine or a container with --privileged."
    if "packages" in missing:
        remedy = (
            "run `make slurm` as root on Debian (it installs them), or: "
            "apt-get install slurm-wlm munge pdsh openssh-server iproute2."
        )
    raise OneLLMError(
        f"no throw-away Slurm can run here: {missing}", "nothing was started or changed.", remedy
    )
