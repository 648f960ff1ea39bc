"""GPUs that are missing, slow, faulty, busy, or used twice."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from onellm_dist.diagnostics.preflight.diagnosis.fault import GIB, Fault
from onellm_dist.diagnostics.preflight.diagnosis.reports import NodeReports

SLOW_GPU = 0.7
"""A GPU is slow below this share of the median speed."""
BUSY_GPU = 2 * GIB
"""Memory of a GPU that other processes may hold."""


def check_gpus(found: NodeReports) -> Iterator[Fault]:
    """Check every rank's GPU, if any rank has one."""
    speeds = [
        report["gpu"]["flops"]
        for report in found.reports.values()
        if report.get("gpu") and not report["gpu"]["missing"]
    ]
    median = statistics.median(speeds) if speeds else 0.0
    some_have_one = any(report.get("gpu") for report in found.reports.values())
    for node in found.nodes:
        for report in found.get_reports(node):
            gpu = report.get("gpu")
            if gpu is not None:
                yield from _check_gpu(node, f"rank {report['rank']}", gpu, median)
            elif some_have_one and "gpu" not in report.get("errors", {}):
                yield Fault(
                    "fail",
                    node,
                    f"rank {report['rank']} sees no GPU, others do",
                    "the driver or the container hides it; see nvidia-smi there.",
                    exclude=True,
                )
        yield from _check_shared_gpus(found, node)
        for gpu in found.get_first(node, "ecc") or ():
            yield from _check_ecc(node, gpu)


def _check_gpu(node: str, who: str, gpu: Mapping[str, Any], median: float) -> Iterator[Fault]:
    if gpu["missing"]:
        yield Fault(
            "fail",
            node,
            f"{who} has no GPU: the node shows {gpu['count']}",
            "ask for the GPUs (--gpus-per-node), or start fewer ranks.",
            exclude=True,
        )
        return
    if not gpu["repeatable"]:
        yield Fault(
            "fail",
            node,
            f"{who}: a matrix product gave other bits the second time",
            "the GPU is faulty: leave the node out.",
            exclude=True,
        )
    if gpu["flops"] < SLOW_GPU * median:
        yield Fault(
            "fail",
            node,
            f"{who}: {gpu['flops'] / 1e12:.0f} TFLOP/s, the median is {median / 1e12:.0f}",
            "a hot or throttled GPU slows every rank: see nvidia-smi -q -d PERFORMANCE.",
            exclude=True,
        )
    used = gpu["total"] - gpu["free"]
    if used > BUSY_GPU:
        yield Fault(
            "fail",
            node,
            f"{who}: {used / GIB:.1f} GiB of its GPU are used by another process",
            "end the left-over process there (nvidia-smi names it).",
            exclude=True,
        )


def _check_shared_gpus(found: NodeReports, node: str) -> Iterator[Fault]:
    """Ranks that each see one GPU may see the same one."""
    owners: dict[str, list[int]] = {}
    for report in found.get_reports(node):
        if uuid := (report.get("gpu") or {}).get("uuid"):
            owners.setdefault(uuid, []).append(report["rank"])
    for ranks in owners.values():
        if len(ranks) > 1:
            yield Fault(
                "fail",
                node,
                f"ranks {', '.join(map(str, ranks))} have the same GPU",
                "ask for one each (--gpus-per-node), or start fewer ranks.",
                exclude=True,
            )


def _check_ecc(node: str, gpu: Mapping[str, str]) -> Iterator[Fault]:
    errors = gpu.get("ecc.errors.uncorrected.volatile.total", "0")
    if errors.isdigit() and int(errors) > 0:
        yield Fault(
            "fail",
            node,
            f"GPU {gpu.get('index')}: {errors} memory error{'s' if errors != '1' else ''} that "
            "could not be corrected",
            "reset or replace it.",
            exclude=True,
        )
    if gpu.get("retired_pages.pending", "").lower() == "yes":
        yield Fault(
            "warn",
            node,
            f"GPU {gpu.get('index')}: bad memory pages wait for a reset to be retired",
            "reset the GPU when the node is free.",
        )
