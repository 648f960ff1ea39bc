"""`slurm.conf` and its like for the throw-away cluster. Seen to work with Slurm 22.05.8 (Debian 12)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONTROLLER = "head"
NETWORK = "10.77.0"
PREFIX_LENGTH = 24
CONTROLLER_PORT, NODE_PORT = 16817, 16818
"""Not Slurm's usual ports; and in a network of their own, where nobody else listens."""
FAKE_GPUS, FAKE_CPUS = 16, 64
"""What each node says it has, so that job scripts for real nodes are accepted; nothing is bound to it."""


def address(place: int) -> str:
    """Of the controller (place 0) or the n-th node (from 1)."""
    return f"{NETWORK}.{place + 1}"


def node_names(count: int) -> list[str]:
    """n1, n2, ..."""
    return [f"n{i + 1}" for i in range(count)]


def slurm_conf(root: Path, nodes: Sequence[str], *, grace_s: int, memory_mb: int) -> str:
    """The configuration of a cluster that lives in `root`.

    Two partitions hold all nodes: jobs of `urgent` preempt those of `normal`, which then have `grace_s` seconds after USR1.
    """
    fixed = {
        "ClusterName": "rehearsal",
        "SlurmctldHost": f"{CONTROLLER}({address(0)})",
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
        f"NodeName={name} NodeAddr={address(i + 1)} {size} State=UNKNOWN"
        for i, name in enumerate(nodes)
    ]
    names = ",".join(nodes)
    lines.append(
        f"PartitionName=normal Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_s}"
    )
    lines.append(f"PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10")
    return "\n".join(lines) + "\n"


def hosts_file(nodes: Sequence[str]) -> str:
    """`/etc/hosts` of every host of the cluster."""
    lines = ["127.0.0.1 localhost", f"{address(0)} {CONTROLLER}"]
    return "\n".join([*lines, *(f"{address(i + 1)} {name}" for i, name in enumerate(nodes))]) + "\n"
