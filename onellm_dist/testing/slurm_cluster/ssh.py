"""sshd on the nodes of a throw-away cluster: keys and configuration that let `ssh n2` work from n1 without questions."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from onellm_dist.testing.slurm_cluster.requirements import find_tool

SSH_CONFIG = Path("/etc/ssh/ssh_config")


def write_ssh(root: Path, nodes: Sequence[str]) -> None:
    """Keys and configuration in the cluster's folder. The user's own `~/.ssh` and this machine's sshd are left alone."""
    for name in ("host_key", "user_key"):
        command = [find_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)]
        subprocess.run(command, check=True, timeout=60)
    (root / "authorized_keys").write_text((root / "user_key.pub").read_text())
    (root / "known_hosts").write_text(
        "".join(f"{n} {(root / 'host_key.pub').read_text()}" for n in nodes)
    )
    (root / "sshd_config").write_text(
        f"HostKey {root}/host_key\nAuthorizedKeysFile {root}/authorized_keys\nPidFile none\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 100\n"
    )
    (root / "ssh_config").write_text(
        f"Host *\n IdentityFile {root}/user_key\n IdentitiesOnly yes\n UserKnownHostsFile {root}/known_hosts\n"
        " StrictHostKeyChecking yes\n BatchMode yes\n LogLevel ERROR\n"
    )


def boot_lines(root: Path, node: str) -> str:
    """What a node's boot script adds: sshd runs, and plain `ssh` finds our keys. `/run` and `/etc/ssh/ssh_config` are the node's own."""
    return (
        f"mount -t tmpfs tmpfs /run\nmkdir /run/sshd\nmount --bind {root}/ssh_config {SSH_CONFIG}\n"
        f"{find_tool('sshd')} -f {root}/sshd_config -E {root}/sshd-{node}.log\n"
    )
