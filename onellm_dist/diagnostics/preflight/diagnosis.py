"""From what the ranks found to what is wrong with which node. Pure: no clocks, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from onellm_dist.diagnostics.preflight.options import ALL, Options
from onellm_dist.diagnostics.preflight.versions import odd_ones

GIB = 1 << 30
SLOW_LINK, SLOW_GPU, SLOW_DISK = 1 / 3, 0.7, 0.2
"""Below this share of the nodes' median a link, a GPU or a disk is slow."""
BUSY_GPU = 2 * GIB
"""Memory of a GPU that somebody else may hold."""
LEAST_SHM, LEAST_FILES = GIB, 4096


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    state: Literal["warn", "fail"]
    node: str
    """"" where it is of no single node."""
    what: str
    do: str
    exclude: bool = False
    """The node itself is to blame: without it the run could go on."""


@dataclass(frozen=True)
class Findings:
    """Everything the ranks brought together; what `judge` looks at."""

    nodes: Mapping[str, Sequence[int]]
    """Node -> its ranks, as far as known; those that never came as well."""
    reports: Mapping[int, Mapping[str, Any]]
    """Rank -> what it found."""
    missing: Mapping[int, str]
    """Rank that never came -> its node, "" where unknown."""
    left_behind: Mapping[int, str] = field(default_factory=dict)
    """Rank that came, and answered no more -> the phase."""
    skews: Mapping[str, float] = field(default_factory=dict)
    """Node -> seconds that its clock is ahead of the nodes' median."""
    needs: Mapping[str, int] | None = None
    """Bytes, by preflight.needs; None without a recipe."""

    def of(self, node: str) -> list[Mapping[str, Any]]:
        """Reports of a node's ranks."""
        return [self.reports[rank] for rank in self.nodes[node] if rank in self.reports]

    def first(self, node: str, key: str) -> Any:
        """What the first rank of the node that has it says."""
        return next((r[key] for r in self.of(node) if r.get(key) is not None), None)


def judge(found: Findings, options: Options) -> list[Fault]:
    """All faults, the worst first."""
    faults = [
        *_absent(found),
        *_errors(found),
        *_gpus(found),
        *_links(found, options),
        *_disks(found, options),
        *_shared(found),
        *_clocks(found, options),
        *_versions(found),
        *_hosts(found),
        *_needs(found),
    ]
    return sorted(faults, key=lambda fault: (fault.state != "fail", not fault.exclude))


def excluded(found: Findings, faults: Sequence[Fault]) -> list[str]:
    """Nodes to leave out. None where it would be every one of them: then the fault is not theirs."""
    bad = {fault.node for fault in faults if fault.exclude and fault.state == "fail" and fault.node}
    return [] if bad >= set(found.nodes) else sorted(bad)


def _absent(found: Findings) -> Iterator[Fault]:
    for node, ranks in _by_node(found.missing).items():
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        if node:
            yield Fault(
                "fail",
                node,
                f"{who} never came",
                "see whether the node is up and its job step started; its log says more.",
                True,
            )
        else:
            yield Fault(
                "fail",
                "",
                f"{who} never came, and nothing says on which node they were to run",
                "see the launcher's log.",
            )
    for rank, phase in found.left_behind.items():
        node = next((n for n, ranks in found.nodes.items() if rank in ranks), "")
        yield Fault(
            "fail",
            node,
            f"rank {rank} answered no more in phase {phase}",
            "the node or its process died, or it is stuck there.",
            True,
        )


def _by_node(ranks: Mapping[int, str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for rank, node in sorted(ranks.items()):
        groups.setdefault(node, []).append(rank)
    return groups


def _errors(found: Findings) -> Iterator[Fault]:
    """A phase that raised or was not done in time. Links are judged by themselves: two nodes share one."""
    together: dict[str, list[int]] = {}
    for node in found.nodes:
        for report in found.of(node):
            for phase, text in report.get("errors", {}).items():
                if phase == ALL:
                    together.setdefault(text, []).append(report["rank"])
                    continue
                yield Fault(
                    "fail",
                    node,
                    f"rank {report['rank']}: {phase}: {text}",
                    "see the message; other nodes passed this.",
                    True,
                )

    for text, ranks in together.items():
        who = f"rank {ranks[0]}" + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")
        yield Fault(
            "fail",
            "",
            f"{who}: {ALL}: {text}",
            "pairs of nodes got on: look at the routes between all, and NCCL/GLOO settings.",
        )


def _gpus(found: Findings) -> Iterator[Fault]:
    speeds = [
        r["gpu"]["flops"]
        for r in found.reports.values()
        if r.get("gpu") and not r["gpu"]["missing"]
    ]
    some = any(r.get("gpu") for r in found.reports.values())
    for node in found.nodes:
        for report in found.of(node):
            gpu, who = report.get("gpu"), f"rank {report['rank']}"
            if gpu is None:
                if some and "gpu" not in report.get("errors", {}):
                    yield Fault(
                        "fail",
                        node,
                        f"{who} sees no GPU, others do",
                        "the driver or the container hides it; see nvidia-smi there.",
                        True,
                    )
                continue
            if gpu["missing"]:
                yield Fault(
                    "fail",
                    node,
                    f"{who} has no GPU: the node shows {gpu['count']}",
                    "ask for the GPUs (--gpus-per-node), or fewer ranks.",
                    True,
                )
                continue
            if not gpu["repeatable"]:
                yield Fault(
                    "fail",
                    node,
                    f"{who}: a matrix product gave other bits the second time",
                    "the GPU is sick: leave the node out.",
                    True,
                )
            if gpu["flops"] < SLOW_GPU * median(speeds):
                text = f"{who}: {gpu['flops'] / 1e12:.0f} TFLOP/s, the median is {median(speeds) / 1e12:.0f}"
                yield Fault(
                    "fail",
                    node,
                    text,
                    "a hot or throttled GPU slows every rank: see nvidia-smi -q -d PERFORMANCE.",
                    True,
                )
            if gpu["total"] - gpu["free"] > BUSY_GPU:
                text = f"{who}: {(gpu['total'] - gpu['free']) / GIB:.1f} GiB of its GPU are taken by somebody else"
                yield Fault(
                    "fail",
                    node,
                    text,
                    "end the left-over process there (nvidia-smi names it).",
                    True,
                )
        yield from _same_gpu(found, node)
        for gpu in found.first(node, "ecc") or ():
            yield from _ecc(node, gpu)


def _same_gpu(found: Findings, node: str) -> Iterator[Fault]:
    """Ranks that are each shown one GPU may be shown the same one."""
    owners: dict[str, list[int]] = {}
    for report in found.of(node):
        if uuid := (report.get("gpu") or {}).get("uuid"):
            owners.setdefault(uuid, []).append(report["rank"])
    for ranks in owners.values():
        if len(ranks) > 1:
            text = f"ranks {', '.join(map(str, ranks))} have the same GPU"
            yield Fault(
                "fail",
                node,
                text,
                "ask for one each (--gpus-per-node), or start fewer ranks.",
                True,
            )


def _ecc(node: str, gpu: Mapping[str, str]) -> Iterator[Fault]:
    errors = gpu.get("ecc.errors.uncorrected.volatile.total", "0")
    if errors.isdigit() and int(errors) > 0:
        yield Fault(
            "fail",
            node,
            f"GPU {gpu.get('index')}: {errors} memory errors that could not be corrected",
            "reset or replace it.",
            True,
        )
    if gpu.get("retired_pages.pending", "").lower() == "yes":
        yield Fault(
            "warn",
            node,
            f"GPU {gpu.get('index')}: bad memory pages wait for a reset to be retired",
            "reset the GPU when the node is free.",
        )


def best_links(found: Findings) -> dict[str, float]:
    """Node -> bytes/s with its best partner."""
    best: dict[str, float] = {}
    for node in found.nodes:
        speeds = [
            pair["speed"]
            for report in found.of(node)
            for pair in report.get("pairs", ())
            if pair.get("speed")
        ]
        if speeds:
            best[node] = max(speeds)
    return best


def _links(found: Findings, options: Options) -> Iterator[Fault]:
    best = best_links(found)
    tried = {node for node in found.nodes if any(report.get("pairs") for report in found.of(node))}
    do = "look at its network card, cable and NCCL/GLOO settings."
    two = len(tried) == 2
    for node in sorted(tried - best.keys()):
        errors = [
            pair["error"]
            for report in found.of(node)
            for pair in report["pairs"]
            if pair.get("error")
        ]
        partners = "its one partner" if two else "any of its partners"
        yield Fault(
            "fail",
            node,
            f"no all-reduce with {partners} came through ({errors[0] if errors else 'no answer'})",
            do,
            not two,
        )
    middle = median(list(best.values()))
    for node, speed in best.items():
        others = [
            p["with"]
            for report in found.of(node)
            for p in report.get("pairs", ())
            if p.get("speed")
        ]
        text = f"all-reduce at {speed / 1e9:.3g} GB/s with its best partner (of {', '.join(dict.fromkeys(others))})"
        if options.min_bandwidth and speed < options.min_bandwidth * 1e9:
            more = (
                "; with two nodes it cannot be told which is slow: try each with a third"
                if two
                else ""
            )
            yield Fault(
                "fail", node, f"{text}, {options.min_bandwidth:g} are asked for{more}", do, not two
            )
        elif len(best) > 2 and speed < SLOW_LINK * middle:
            yield Fault("fail", node, f"{text}, the nodes' median is {middle / 1e9:.3g}", do, True)
        yield from _broken_pairs(found, node, best)


def _broken_pairs(found: Findings, node: str, best: Mapping[str, float]) -> Iterator[Fault]:
    """A pair that failed although each of the two got on with others: told once, by the first of them."""
    for report in found.of(node)[:1]:
        for pair in report.get("pairs", ()):
            if pair.get("error") and pair["with"] in best and node < pair["with"]:
                yield Fault(
                    "fail",
                    "",
                    f"no all-reduce between {node} and {pair['with']} ({pair['error']}), with others both got on",
                    "look at the route.",
                )


def _disks(found: Findings, options: Options) -> Iterator[Fault]:
    disks = {node: disk for node in found.nodes if (disk := found.first(node, "disk"))}
    speeds = [disk["write"] for disk in disks.values() if "write" in disk]
    for node, disk in disks.items():
        speed = disk.get("write")
        if "error" in disk:
            everywhere = all("error" in other for other in disks.values())
            yield Fault(
                "fail",
                node,
                f"run.dir cannot be written: {disk['error']}",
                "make room, mount it, or give another run.dir.",
                not everywhere,
            )
        elif options.min_disk and speed < options.min_disk * 1e6:
            yield Fault(
                "fail",
                node,
                f"run.dir is written at {speed / 1e6:.0f} MB/s, {options.min_disk:g} are asked for",
                "see the file system.",
                True,
            )
        elif len(speeds) > 2 and speed < SLOW_DISK * median(speeds):
            text = f"run.dir is written at {speed / 1e6:.0f} MB/s, the nodes' median is {median(speeds) / 1e6:.0f}"
            yield Fault(
                "warn", node, text, "every checkpoint waits for the slowest node: see its mount."
            )
    for node in found.nodes:
        for folder in (found.first(node, "data") or {}).get("missing", ()):
            yield Fault(
                "fail",
                node,
                f"cannot read {folder}",
                "mount the data there, or mend data.root.",
                True,
            )


def _shared(found: Findings) -> Iterator[Fault]:
    """run.dir is one directory for nodes that see each other's files in it. More than half of the nodes have the right one."""
    sees = {
        node: set(seen)
        for node in found.nodes
        if (seen := found.first(node, "sees")) is not None
        and not any("shared" in report.get("errors", {}) for report in found.of(node))
    }
    groups = {
        node: [n for n in sees if n == node or (n in sees[node] and node in sees[n])]
        for node in sees
    }
    largest = max(groups.values(), key=len, default=[])
    others = [node for node in sees if node not in largest]
    do = "run.dir must lie on a file system that all nodes share."
    if 2 * len(largest) > len(sees):
        for node in others:
            yield Fault(
                "fail",
                node,
                f"run.dir is not the directory that {', '.join(largest[:4])} see",
                do,
                True,
            )
    elif others:
        yield Fault(
            "fail",
            "",
            f"run.dir is one directory on {', '.join(largest[:4])}, and another on {', '.join(others[:4])}",
            do,
        )


def _clocks(found: Findings, options: Options) -> Iterator[Fault]:
    for node, skew in found.skews.items():
        if abs(skew) > options.max_skew / (2 if len(found.skews) == 2 else 1):
            two = "; with two nodes it cannot be told whose" if len(found.skews) == 2 else ""
            apart = 2 * abs(skew) if len(found.skews) == 2 else abs(skew)
            text = f"its clock is {apart:.2f} s {'ahead' if skew > 0 else 'behind'}{two}"
            yield Fault(
                "fail",
                node,
                text,
                "set the clock (chronyc makestep): file times and logs would mislead.",
                not two,
            )


def _versions(found: Findings) -> Iterator[Fault]:
    nodes = [node for node in found.nodes if found.first(node, "versions")]
    for name, groups in odd_ones({node: found.first(node, "versions") for node in nodes}).items():
        common, *others = groups.items()
        clear = len(common[1]) > len(nodes) / 2
        for value, odd in others:
            for node in odd:
                text = f"{name} is {value}, on {', '.join(common[1][:4])} it is {common[0]}"
                yield Fault(
                    "fail",
                    node,
                    text,
                    "install the same environment on all nodes, or use one on a shared disk.",
                    clear,
                )
    for name, groups in odd_ones(
        {node: found.first(node, "environment") or {} for node in nodes}
    ).items():
        words = "; ".join(f"{value!r} on {', '.join(where[:4])}" for value, where in groups.items())
        yield Fault(
            "warn",
            "",
            f"{name} differs: {words}",
            "set it alike on all nodes (srun --export, .deepspeed_env), or nowhere.",
        )


def _hosts(found: Findings) -> Iterator[Fault]:
    for node in found.nodes:
        host = found.first(node, "host")
        if host is None:
            continue
        if host["shm_free"] is None or host["shm_free"] < LEAST_SHM:
            have = (
                "no /dev/shm"
                if host["shm_free"] is None
                else f"{host['shm_free'] / GIB:.2f} GiB free in /dev/shm"
            )
            yield Fault(
                "warn",
                node,
                have,
                "give the container more (--shm-size, --ipc=host): loader workers pass batches through it.",
            )
        if host["open_files"] < LEAST_FILES:
            yield Fault(
                "warn",
                node,
                f"at most {host['open_files']} open files",
                "ulimit -n 65536 in the job script: loaders hold many shards open.",
            )


def _needs(found: Findings) -> Iterator[Fault]:
    if not found.needs:
        return
    for node in found.nodes:
        host, disk, ranks = (
            found.first(node, "host"),
            found.first(node, "disk"),
            len(found.of(node)),
        )
        if host and host["memory_free"] < found.needs["host"] * ranks:
            text = f"{host['memory_free'] / GIB:.1f} GiB of memory free, the recipe needs about {found.needs['host'] * ranks / GIB:.1f}"
            yield Fault("fail", node, text, "end what else runs there, or use more nodes.", True)
        for report in found.of(node):
            gpu = report.get("gpu")
            if gpu and not gpu["missing"] and gpu["free"] < found.needs["gpu"]:
                text = f"rank {report['rank']}: {gpu['free'] / GIB:.0f} GiB of GPU memory free, the recipe needs "
                text += f"{found.needs['gpu'] / GIB:.0f} and activations"
                yield Fault("fail", node, text, "use more GPUs, a higher ZeRO stage, or offload.")
    short = [
        n
        for n in found.nodes
        if "free" in (disk := found.first(n, "disk") or {}) and disk["free"] < found.needs["disk"]
    ]
    if short:
        free = min(found.first(node, "disk")["free"] for node in short)
        text = f"{free / GIB:.1f} GiB free at run.dir, checkpoints and the model need about {found.needs['disk'] / GIB:.1f}"
        yield Fault(
            "fail",
            "" if len(short) == len(found.nodes) else short[0],
            text,
            "make room, lower checkpoint.keep, or give another run.dir.",
        )


def median(values: Sequence[float]) -> float:
    """The middle value; 0 of nothing."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return (
        0.0
        if not ordered
        else ordered[half]
        if len(ordered) % 2
        else (ordered[half - 1] + ordered[half]) / 2
    )
