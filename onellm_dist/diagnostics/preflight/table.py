"""A preflight for people and for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onellm_dist.diagnostics.preflight.diagnosis import GIB, Fault, Findings, best_links

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


def rows_of(found: Findings, faults: Sequence[Fault]) -> list[tuple[str, ...]]:
    """A line a node."""
    links = best_links(found)
    rows = list[tuple[str, ...]]()
    for node, ranks in found.nodes.items():
        disk, data, host = (found.first(node, key) or {} for key in ("disk", "data", "host"))
        gpus = [r["gpu"] for r in found.of(node) if r.get("gpu") and not r["gpu"]["missing"]]
        device = (
            f"{len(gpus)} x {gpus[0]['name']}, {min(g['flops'] for g in gpus) / 1e12:.0f} TFLOP/s"
            if gpus
            else "none"
        )
        states = {fault.state for fault in faults if fault.node == node}
        rows.append(
            (
                node,
                str(len(ranks)),
                device if found.of(node) else "–",
                f"{links[node] / 1e9:.3g}" if node in links else "–",
                f"{disk['write'] / 1e6:.0f} / {disk['read'] / 1e6:.0f}" if "write" in disk else "–",
                f"{data['read'] / 1e6:.0f}" if data.get("read") else "–",
                f"{found.skews[node]:+.3f}" if node in found.skews else "–",
                f"{host['memory_free'] / GIB:.1f} of {host['memory_total'] / GIB:.1f}"
                if host
                else "–",
                "FAIL" if "fail" in states else "warn" if "warn" in states else "ok",
            )
        )
    return rows


def text_of(
    found: Findings, faults: Sequence[Fault], exclude: Sequence[str], seconds: float
) -> str:
    """The table, a line a fault with its remedy, and the verdict."""
    rows = [HEAD, *rows_of(found, faults)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for fault in faults:
        place = f"{fault.node}: " if fault.node else ""
        lines += [f"[{fault.state}] {place}{fault.what}", f"       -> {fault.do}"]
    together = max((r["all"] for r in found.reports.values() if r.get("all")), default=None)
    if together is not None:
        lines.append(
            f"all-reduce of all {len(found.reports)} ranks: {together / 1e9:.3g} GB/s (bus bandwidth)"
        )
    failed = sum(fault.state == "fail" for fault in faults)
    verdict = (
        f"{failed} fault{'s' if failed != 1 else ''}: do not start" if failed else "ready to train"
    )
    lines.append(
        f"{len(found.nodes)} nodes, {len(found.reports)} ranks, {seconds:.0f} s: {verdict}."
    )
    if exclude:
        lines.append(f"without the bad ones: --exclude={','.join(exclude)}")
    return "\n".join(lines)


def json_of(
    found: Findings, faults: Sequence[Fault], exclude: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Everything, for scripts."""
    return {
        "ok": not any(fault.state == "fail" for fault in faults),
        "exclude": list(exclude),
        "faults": [vars(fault) for fault in faults],
        "nodes": {node: _node_json(found, node) for node in found.nodes},
        "missing_ranks": {str(k): v for k, v in found.missing.items()},
        "left_behind": {str(k): v for k, v in found.left_behind.items()},
        "needs": found.needs,
        "seconds": seconds,
    }


def _node_json(found: Findings, node: str) -> Mapping[str, Any]:
    keys = ("versions", "environment", "host", "disk", "data", "ecc")
    gpus = [r["gpu"] for r in found.of(node) if r.get("gpu")]
    return {
        "ranks": list(found.nodes[node]),
        "clock_ahead_s": found.skews.get(node),
        "link_bytes_per_s": best_links(found).get(node),
        "gpus": gpus,
        "pairs": [pair for r in found.of(node)[:1] for pair in r.get("pairs", ())],
        **{key: found.first(node, key) for key in keys},
    }
