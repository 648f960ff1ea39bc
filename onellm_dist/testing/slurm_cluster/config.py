"""The configuration files of the throw-away cluster; they work with Slurm 22.05.8 (Debian 12)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONTROLLER = "head"
NETWORK = "10.77.0"
PREFIX_LENGTH = 24
CONTROLLER_PORT = 16817
NODE_PORT = 16818
"""Not Slurm's usual ports, and in a network of their own, where nobody else listens."""
FAKE_GPUS = 16
FAKE_CPUS = 64
"""What each node claims to have, so that job scripts for real nodes are accepted. Nothing is bound
to it."""


def get_address(index: int) -> str:
    """Address of the controller (index 0) or of the n-th node (from 1)."""
    return f"{NETWORK}.{index + 1}"


def make_node_names(count: int) -> list[str]:
    """Make the names of the nodes: n1, n2, ..."""
    return [f"n{i + 1}" for i in range(count)]


def format_slurm_conf(root: Path, nodes: Sequence[str], *, grace_s: int, memory_mb: int) -> str:
    """Format the `slurm.conf` of a cluster.

    Two partitions have all nodes. Jobs of `urgent` preempt those of `normal`.

    Args:
        root: folder of all files of the cluster.
        nodes: names of the nodes.
        grace_s: seconds between the USR1 and the end of a preempted job.
        memory_mb: memory of each node.
    """
    fixed = {
        "ClusterName": "rehearsal",
        "SlurmctldHost": f"{CONTROLLER}({get_address(0)})",
        "SlurmctldPort": CONTROLLER_PORT,
        "SlurmdPort": NODE_PORT,
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={root}/munge.socket",
        "StateSaveLocation": f"{root}/state",
        "SlurmdSpoolDir": f"{root}/spool-%n",
        "SlurmctldPidFile": f"{root}/slurmctld.pid",
        "SlurmdPidFile": f"{root}/slurmd-%n.pid",
        "SlurmctldLogFile": f"{root}/slurmctld.log",
        "SlurmdLogFile": f"{root}/slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/none",
        "SchedulerParameters": "batch_sched_delay=0,bf_interval=2,sched_interval=2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
        "SlurmdParameters": "config_overrides",
        "ReturnToService": 2,
        "JobRequeue": 1,
        "KillWait": 5,
        "SlurmdTimeout": 10,
        "PropagateResourceLimits": "NONE",
        "GresTypes": "gpu",
    }
    lines = [f"{key}={value}" for key, value in fixed.items()]
    size = f"CPUs={FAKE_CPUS} RealMemory={memory_mb} Gres=gpu:{FAKE_GPUS}"
    lines += [
        f"NodeName={name} NodeAddr={get_address(i + 1)} {size} State=UNKNOWN"
        for i, name in enumerate(nodes)
    ]
    common = f"Nodes={','.join(nodes)} MaxTime=INFINITE State=UP"
    lines.append(f"PartitionName=normal {common} Default=YES PriorityTier=1 GraceTime={grace_s}")
    lines.append(f"PartitionName=urgent {common} PriorityTier=10")
    return "\n".join(lines) + "\n"


def format_hosts(nodes: Sequence[str]) -> str:
    """Format the `/etc/hosts` of every host of the cluster."""
    lines = ["127.0.0.1 localhost", f"{get_address(0)} {CONTROLLER}"]
    lines += [f"{get_address(i + 1)} {name}" for i, name in enumerate(nodes)]
    return "\n".join(lines) + "\n"
