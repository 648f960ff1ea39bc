"""Clocks, versions, limits and memory of the nodes."""

from __future__ import annotations

from collections.abc import Iterator

from onellm_dist.diagnostics.preflight.diagnosis.fault import GIB, Fault
from onellm_dist.diagnostics.preflight.diagnosis.reports import NodeReports
from onellm_dist.diagnostics.preflight.options import PreflightOptions
from onellm_dist.diagnostics.preflight.versions import find_differences

ENOUGH_SHM = GIB
ENOUGH_OPEN_FILES = 4096


def check_clocks(found: NodeReports, options: PreflightOptions) -> Iterator[Fault]:
    """Clocks that are too far from the nodes' median."""
    # The median of two clocks is halfway between them: neither is known to be wrong.
    two = len(found.skews) == 2
    for node, skew in found.skews.items():
        if abs(skew) > options.max_skew / (2 if two else 1):
            apart = 2 * abs(skew) if two else abs(skew)
            direction = "ahead" if skew > 0 else "behind"
            doubt = "; of two clocks the wrong one cannot be determined" if two else ""
            yield Fault(
                "fail",
                node,
                f"its clock is {apart:.2f} s {direction}{doubt}",
                "set the clock (chronyc makestep): file times and logs would mislead.",
                exclude=not two,
            )


def check_versions(found: NodeReports) -> Iterator[Fault]:
    """Versions and environment variables that differ between nodes."""
    nodes = [node for node in found.nodes if found.get_first(node, "versions")]
    versions = {node: found.get_first(node, "versions") for node in nodes}
    for name, groups in find_differences(versions).items():
        common, *others = groups.items()
        clear = len(common[1]) > len(nodes) / 2
        for value, odd in others:
            for node in odd:
                yield Fault(
                    "fail",
                    node,
                    f"{name} is {value}, on {', '.join(common[1][:4])} it is {common[0]}",
                    "install the same environment on all nodes, or use one on a shared disk.",
                    exclude=clear,
                )
    variables = {node: found.get_first(node, "environment") or {} for node in nodes}
    for name, groups in find_differences(variables).items():
        values = "; ".join(f"{value!r} on {', '.join(on[:4])}" for value, on in groups.items())
        yield Fault(
            "warn",
            "",
            f"{name} differs: {values}",
            "set it to the same value on all nodes (srun --export, or the launcher's environment "
            "file), or on none.",
        )


def check_limits(found: NodeReports) -> Iterator[Fault]:
    """Too little shared memory, or too few open files."""
    for node in found.nodes:
        host = found.get_first(node, "host")
        if host is None:
            continue
        free = host["shm_free"]
        if free is None or free < ENOUGH_SHM:
            text = "no /dev/shm" if free is None else f"{free / GIB:.2f} GiB free in /dev/shm"
            yield Fault(
                "warn",
                node,
                text,
                "give the container more (--shm-size, --ipc=host): NCCL connects the GPUs of a "
                "node through it.",
            )
        if host["open_files"] < ENOUGH_OPEN_FILES:
            yield Fault(
                "warn",
                node,
                f"at most {host['open_files']} open files",
                "ulimit -n 65536 in the job script: loader workers keep many shards open.",
            )


def check_needs(found: NodeReports) -> Iterator[Fault]:
    """Too little memory or disk for the recipe."""
    needs = found.needs
    if not needs:
        return
    for node in found.nodes:
        host = found.get_first(node, "host")
        needed = needs["host"] * len(found.get_reports(node))
        if host and host["memory_free"] < needed:
            yield Fault(
                "fail",
                node,
                f"{host['memory_free'] / GIB:.1f} GiB of memory free, the recipe needs about "
                f"{needed / GIB:.1f}",
                "end what else runs there, or use more nodes.",
                exclude=True,
            )
        for report in found.get_reports(node):
            gpu = report.get("gpu")
            if gpu and not gpu["missing"] and gpu["free"] < needs["gpu"]:
                yield Fault(
                    "fail",
                    node,
                    f"rank {report['rank']}: {gpu['free'] / GIB:.0f} GiB of GPU memory free, the "
                    f"recipe needs {needs['gpu'] / GIB:.0f} and activations",
                    "use more GPUs, shard more of the state (a higher ZeRO stage), or offload it.",
                )
    yield from _check_disk_needs(found, needs["disk"])


def _check_disk_needs(found: NodeReports, needed: int) -> Iterator[Fault]:
    free = {
        node: disk["free"]
        for node in found.nodes
        if "free" in (disk := found.get_first(node, "disk") or {})
    }
    short = [node for node, size in free.items() if size < needed]
    if short:
        yield Fault(
            "fail",
            "" if len(short) == len(found.nodes) else short[0],
            f"{min(free[node] for node in short) / GIB:.1f} GiB free at run.dir, checkpoints and "
            f"the model need about {needed / GIB:.1f}",
            "make room, lower checkpoint.keep, or give another run.dir.",
        )
