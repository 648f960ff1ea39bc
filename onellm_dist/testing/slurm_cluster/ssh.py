"""sshd on the nodes of a throw-away cluster: `ssh n2` works from n1 without questions."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from onellm_dist.testing.slurm_cluster.requirements import find_tool

SSH_CONFIG = Path("/etc/ssh/ssh_config")
SSHD_CONFIG_TEXT = """\
HostKey {root}/host_key
AuthorizedKeysFile {root}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxStartups 100
"""
SSH_CONFIG_TEXT = """\
Host *
 IdentityFile {root}/user_key
 IdentitiesOnly yes
 UserKnownHostsFile {root}/known_hosts
 StrictHostKeyChecking yes
 BatchMode yes
 LogLevel ERROR
"""


def write_ssh_files(root: Path, nodes: Sequence[str]) -> None:
    """Write keys and configuration into the cluster's folder.

    The user's own `~/.ssh` and this machine's sshd are not touched.

    Args:
        root: the cluster's folder.
        nodes: names of the nodes.
    """
    for name in ("host_key", "user_key"):
        command = [find_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)]
        subprocess.run(command, check=True, timeout=60)
    (root / "authorized_keys").write_text((root / "user_key.pub").read_text())
    host_key = (root / "host_key.pub").read_text()
    (root / "known_hosts").write_text("".join(f"{node} {host_key}" for node in nodes))
    (root / "sshd_config").write_text(SSHD_CONFIG_TEXT.format(root=root))
    (root / "ssh_config").write_text(SSH_CONFIG_TEXT.format(root=root))


def format_boot_lines(root: Path, node: str) -> str:
    """Format the lines of a node's boot script that start sshd and make plain `ssh` find our keys.

    `/run` and `/etc/ssh/ssh_config` are the node's own.

    Args:
        root: the cluster's folder.
        node: name of the node.
    """
    sshd = find_tool("sshd")
    return (
        f"mount -t tmpfs tmpfs /run\nmkdir /run/sshd\nmount --bind {root}/ssh_config {SSH_CONFIG}\n"
        f"{sshd} -f {root}/sshd_config -E {root}/sshd-{node}.log\n"
    )
