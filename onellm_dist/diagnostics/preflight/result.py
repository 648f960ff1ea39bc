"""The result of a preflight, for people and for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onellm_dist.diagnostics.preflight.diagnosis.fault import GIB, Fault
from onellm_dist.diagnostics.preflight.diagnosis.reports import NodeReports

HEAD = (
    "node",
    "ranks",
    "GPU",
    "link GB/s",
    "run.dir MB/s",
    "data MB/s",
    "clock s",
    "memory GiB",
    "",
)


def build_rows(found: NodeReports, faults: Sequence[Fault]) -> list[tuple[str, ...]]:
    """A row for each node."""
    links = found.get_best_links()
    rows = list[tuple[str, ...]]()
    for node, ranks in found.nodes.items():
        disk = found.get_first(node, "disk") or {}
        data = found.get_first(node, "data") or {}
        host = found.get_first(node, "host") or {}
        states = {fault.state for fault in faults if fault.node == node}
        memory = "–"
        if host:
            memory = f"{host['memory_free'] / GIB:.1f} of {host['memory_total'] / GIB:.1f}"
        speeds = "–"
        if "write" in disk:
            speeds = f"{disk['write'] / 1e6:.0f} / {disk['read'] / 1e6:.0f}"
        rows.append(
            (
                node,
                str(len(ranks)),
                _describe_gpus(found, node),
                f"{links[node] / 1e9:.3g}" if node in links else "–",
                speeds,
                f"{data['read'] / 1e6:.0f}" if data.get("read") else "–",
                f"{found.skews[node]:+.3f}" if node in found.skews else "–",
                memory,
                "FAIL" if "fail" in states else "warn" if "warn" in states else "ok",
            )
        )
    return rows


def _describe_gpus(found: NodeReports, node: str) -> str:
    reports = found.get_reports(node)
    gpus = [r["gpu"] for r in reports if r.get("gpu") and not r["gpu"]["missing"]]
    if gpus:
        slowest = min(gpu["flops"] for gpu in gpus) / 1e12
        return f"{len(gpus)} x {gpus[0]['name']}, {slowest:.0f} TFLOP/s"
    return "none" if reports else "–"


def format_result(
    found: NodeReports, faults: Sequence[Fault], exclude: Sequence[str], seconds: float
) -> str:
    """The table, a line for each fault with its remedy, and the conclusion."""
    rows = [HEAD, *build_rows(found, faults)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for fault in faults:
        node = f"{fault.node}: " if fault.node else ""
        lines += [f"[{fault.state}] {node}{fault.what}", f"       -> {fault.remedy}"]
    speed = max((r["all"] for r in found.reports.values() if r.get("all")), default=None)
    ranks = _count(len(found.reports), "rank")
    if speed is not None:
        lines.append(f"all-reduce of all {ranks}: {speed / 1e9:.3g} GB/s (bus bandwidth)")
    failed = sum(fault.state == "fail" for fault in faults)
    conclusion = f"{_count(failed, 'fault')}: do not start" if failed else "ready to train"
    lines.append(f"{_count(len(found.nodes), 'node')}, {ranks}, {seconds:.0f} s: {conclusion}.")
    if exclude:
        lines.append(f"without the bad nodes: --exclude={','.join(exclude)}")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def result_to_json(
    found: NodeReports, faults: Sequence[Fault], exclude: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Everything, for scripts."""
    return {
        "ok": not any(fault.state == "fail" for fault in faults),
        "exclude": list(exclude),
        "faults": [vars(fault) for fault in faults],
        "nodes": {node: _node_to_json(found, node) for node in found.nodes},
        "missing_ranks": {str(k): v for k, v in found.missing.items()},
        "left_behind": {str(k): v for k, v in found.left_behind.items()},
        "needs": found.needs,
        "seconds": seconds,
    }


def _node_to_json(found: NodeReports, node: str) -> Mapping[str, Any]:
    keys = ("versions", "environment", "host", "disk", "data", "ecc")
    reports = found.get_reports(node)
    return {
        "ranks": list(found.nodes[node]),
        "clock_ahead_s": found.skews.get(node),
        "link_bytes_per_s": found.get_best_links().get(node),
        "gpus": [report["gpu"] for report in reports if report.get("gpu")],
        "pairs": [pair for report in reports[:1] for pair in report.get("pairs", ())],
        **{key: found.get_first(node, key) for key in keys},
    }
