"""Disks that are full, slow or not shared, and data that cannot be read."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from onellm_dist.diagnostics.preflight.diagnosis.fault import Fault
from onellm_dist.diagnostics.preflight.diagnosis.reports import NodeReports
from onellm_dist.diagnostics.preflight.options import PreflightOptions

SLOW_DISK = 0.2
"""A disk is slow below this share of the nodes' median."""
SHARED_REMEDY = "put run.dir on a file system that all nodes share."


def check_disks(found: NodeReports, options: PreflightOptions) -> Iterator[Fault]:
    """Check that every node can write `run.dir` and read the data."""
    disks = {node: disk for node in found.nodes if (disk := found.get_first(node, "disk"))}
    speeds = [disk["write"] for disk in disks.values() if "write" in disk]
    median = statistics.median(speeds) if speeds else 0.0
    for node, disk in disks.items():
        speed = disk.get("write")
        if "error" in disk:
            everywhere = all("error" in other for other in disks.values())
            yield Fault(
                "fail",
                node,
                f"run.dir cannot be written: {disk['error']}",
                "make room, mount it, or give another run.dir.",
                exclude=not everywhere,
            )
        elif options.min_disk and speed < options.min_disk * 1e6:
            yield Fault(
                "fail",
                node,
                f"run.dir is written at {speed / 1e6:.0f} MB/s, {options.min_disk:g} required",
                "check the file system.",
                exclude=True,
            )
        elif len(speeds) > 2 and speed < SLOW_DISK * median:
            yield Fault(
                "warn",
                node,
                f"run.dir is written at {speed / 1e6:.0f} MB/s, the nodes' median is "
                f"{median / 1e6:.0f}",
                "every checkpoint waits for the slowest node: check its mount.",
            )
    for node in found.nodes:
        for folder in (found.get_first(node, "data") or {}).get("missing", ()):
            yield Fault(
                "fail",
                node,
                f"cannot read {folder}",
                "mount the data there, or correct data.root.",
                exclude=True,
            )


def check_shared_directory(found: NodeReports) -> Iterator[Fault]:
    """Check that `run.dir` is one directory: nodes then see each other's files in it.

    If more than half of the nodes see each other's files, the others have the wrong directory.
    """
    visible = {
        node: set(names)
        for node in found.nodes
        if (names := found.get_first(node, "sees")) is not None
        and not any("shared" in report.get("errors", {}) for report in found.get_reports(node))
    }
    groups = {
        node: [n for n in visible if n == node or (n in visible[node] and node in visible[n])]
        for node in visible
    }
    largest = max(groups.values(), key=len, default=[])
    others = [node for node in visible if node not in largest]
    names = ", ".join(largest[:4])
    if 2 * len(largest) > len(visible):
        for node in others:
            yield Fault(
                "fail",
                node,
                f"run.dir is not the directory that {names} see",
                SHARED_REMEDY,
                exclude=True,
            )
    elif others:
        yield Fault(
            "fail",
            "",
            f"run.dir is one directory on {names}, and another on {', '.join(others[:4])}",
            SHARED_REMEDY,
        )
