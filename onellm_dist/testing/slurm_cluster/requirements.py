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
SSH_PACKAGES = {
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
}
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def find_tool(name: str) -> str:
    """Where a tool lies; daemons are often outside PATH."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise OneLLMError(
            f"{name} is not here",
            "a throw-away Slurm needs it.",
            f"install the package {({**PACKAGES, **SSH_PACKAGES})[name]}.",
        )
    return found


def what_is_missing(*, ssh: bool = False) -> str:
    """Why no throw-away Slurm can run here; empty where one can."""
    if not sys.platform.startswith("linux"):
        return "Linux is needed (its namespaces)"
    wanted = {**PACKAGES, **(SSH_PACKAGES if ssh else {})}
    missing = sorted(
        {package for tool, package in wanted.items() if shutil.which(tool, path=_PATH) is None}
    )
    if missing:
        return f"Debian packages are missing: {' '.join(missing)}"
    if os.geteuid() != 0:
        return "root is needed, for namespaces and Slurm's daemons"
    tried = subprocess.run(
        [*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return (
        ""
        if tried.returncode == 0
        else f"namespaces are not permitted here ({tried.stderr.strip()})"
    )


def check_needs(*, ssh: bool = False) -> None:
    """Raise where no throw-away Slurm can run here.

    Raises:
        OneLLMError: with what is missing and how to get it.
    """
    missing = what_is_missing(ssh=ssh)
    if not missing:
        return
    remedy = (
        "run `make slurm` as root on Debian (it installs them), or: apt-get install slurm-wlm munge pdsh openssh-server iproute2."
        if "packages" in missing
        else "run as root, in a virtual machine or a container with --privileged."
    )
    raise OneLLMError(
        f"no throw-away Slurm here: {missing}", "nothing was started or changed.", remedy
    )
