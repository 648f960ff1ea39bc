"""`onellm doctor --distributed`: as a rank of a launcher, or alone (it then starts local ranks)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onellm_dist.common import run_files
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.output import write_error, write_output
from onellm_dist.common.processes import make_module_command, make_safe_environment
from onellm_dist.config.load import load_config
from onellm_dist.config.schema import RunConfig
from onellm_dist.diagnostics.preflight.options import (
    PreflightOptions,
    get_node_name,
    read_simulated_faults,
)
from onellm_dist.launch.local import end_with_parent, find_free_port, launch_local
from onellm_dist.launch.ranks import Ranks, discover_ranks
from onellm_dist.launch.slurm.environment import expand_hosts, parse_tasks_per_node

if TYPE_CHECKING:
    from onellm_dist.diagnostics.preflight.rank_probe import RankProbe
    from onellm_dist.diagnostics.preflight.rendezvous import Rendezvous

EXIT_CODE_FILE = "ONELLM_PREFLIGHT_EXIT_CODE_FILE"
"""Names the file in which a local rank 0 leaves the exit code for the process that started it."""


@dataclass(frozen=True)
class _Collected:
    """What rank 0 knows at the end of a preflight."""

    nodes: dict[str, list[int]]
    reports: Mapping[int, Mapping[str, Any]]
    missing: Mapping[int, str]
    left_behind: Mapping[int, str]
    skews: Mapping[str, float]
    seconds: float


def run_preflight(options: PreflightOptions, *, local_ranks: int | None = None) -> int:
    """Check every node. In a process that a launcher started, it does not return.

    Args:
        options: limits and paths.
        local_ranks: ranks to start without a launcher; default: `launch.ranks` of the recipe, or
            one per GPU.

    Returns:
        0: ready; 1: something would break or slow the run.

    Raises:
        UsageError: the recipe is wrong, or what the launcher set is.
    """
    config = load_config(options.recipe, options.overrides) if options.recipe else None
    ranks = discover_ranks()
    if ranks is None:
        count = local_ranks or (config.launch.ranks if config else None) or _count_gpus() or 1
        if count > 1:
            return _start_local(options, count)
        ranks = Ranks(0, 1, 0, 1, "127.0.0.1", find_free_port())
    end_with_parent()
    code = _run_rank(options, config, ranks)
    sys.stdout.flush()
    sys.stderr.flush()
    code_file = os.environ.get(EXIT_CODE_FILE)
    if code_file:
        if ranks.rank == 0:
            Path(code_file).write_text(str(code), encoding="ascii")
        code = EXIT_DONE  # the parent reads the file; a failing rank would be taken for a crash
    os._exit(code)  # a stuck disk or collective would hold up Python's own end


def _start_local(options: PreflightOptions, count: int) -> int:
    with tempfile.TemporaryDirectory(prefix="onellm-preflight-") as folder:
        code_file = Path(folder) / "code"
        os.environ[EXIT_CODE_FILE] = str(code_file)
        module = "onellm_dist.diagnostics.preflight"
        command = make_module_command(module, _format_options(options))
        try:
            code = launch_local(command, count, Path(folder), make_safe_environment())
        finally:
            del os.environ[EXIT_CODE_FILE]
        if code_file.exists():
            return int(code_file.read_text(encoding="ascii"))
        return code or EXIT_FAILED


def _format_options(options: PreflightOptions) -> str:
    values = asdict(options).items()
    return json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in values})


def parse_options(text: str) -> PreflightOptions:
    """The options that `_start_local` passed to a local rank."""
    values = json.loads(text)
    for key in ("recipe", "exclude_file"):
        values[key] = Path(values[key]) if values[key] else None
    values["overrides"] = tuple(values["overrides"])
    return PreflightOptions(**values)


def _run_rank(options: PreflightOptions, config: RunConfig | None, ranks: Ranks) -> int:
    from onellm_dist.diagnostics.preflight.rank_probe import RankProbe
    from onellm_dist.diagnostics.preflight.rendezvous import Rendezvous
    from onellm_dist.diagnostics.preflight.roster import build_roster

    started = time.perf_counter()
    simulated = read_simulated_faults()
    node = get_node_name(simulated)
    expected = get_expected_nodes(os.environ)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        rendezvous = Rendezvous(ranks, options.wait, agent=agent)
        roster, missing = build_roster(rendezvous, ranks, node, options, expected)
        if roster is None:
            write_error(f"rank {ranks.rank} on {node} joined too late: the others began without it")
            return EXIT_FAILED
        probe = RankProbe(rendezvous, ranks, roster, node, options, simulated)
        skews = _run_probe(probe, config)
        rendezvous.put(f"report/{ranks.rank}", probe.report)
        if ranks.rank != 0:
            # Rank 0 imports the model's classes before it answers.
            code = int(rendezvous.get("exit-code", options.limit * 2 + options.wait))
            rendezvous.put(f"bye/{ranks.rank}", True)
            return code
        collected = _collect(rendezvous, probe, missing, skews, started)
        code = _conclude(options, config, ranks, collected)
        rendezvous.put("exit-code", code)
        rendezvous.collect("bye", [rank for rank in roster.present if rank != 0], 5.0)
        return code
    except (OneLLMError, TimeoutError) as error:  # rank 0 never came, or is gone
        _report_missing_rank_0(options, ranks, expected.get(0, ""), error)
        return EXIT_FAILED


def _run_probe(probe: RankProbe, config: RunConfig | None) -> dict[str, float]:
    """Run all checks of this rank; returns the nodes' clock offsets on rank 0."""
    probe.run_local_checks(config)
    if not probe.enter("own checks"):
        return {}
    if config is not None:
        probe.check_shared_directory(config)
    skews = probe.compare_clocks()
    probe.measure_links()
    return skews


def _collect(
    rendezvous: Rendezvous,
    probe: RankProbe,
    missing: Mapping[int, str],
    skews: Mapping[str, float],
    started: float,
) -> _Collected:
    """On rank 0: wait for the reports of all ranks that are present."""
    roster = probe.roster
    reports = rendezvous.collect("report", roster.present, probe.options.limit)
    roster.left_behind |= {rank: "the end" for rank in roster.present if rank not in reports}
    nodes = {node: list(ranks) for node, ranks in roster.nodes.items()}
    for rank, name in missing.items():
        if name:
            nodes.setdefault(name, []).append(rank)
    seconds = time.perf_counter() - started
    return _Collected(nodes, reports, missing, roster.left_behind, skews, seconds)


def _conclude(
    options: PreflightOptions, config: RunConfig | None, ranks: Ranks, collected: _Collected
) -> int:
    """On rank 0: print and write the result, and turn it into the exit code."""
    from onellm_dist.diagnostics.preflight.diagnosis.diagnose import (
        find_faults,
        get_excluded_nodes,
    )
    from onellm_dist.diagnostics.preflight.diagnosis.fault import Fault
    from onellm_dist.diagnostics.preflight.diagnosis.reports import NodeReports
    from onellm_dist.diagnostics.preflight.resource_needs import estimate_needs
    from onellm_dist.diagnostics.preflight.result import format_result, result_to_json

    needs = None
    unknown = list[Fault]()
    if config is not None:
        try:
            needs = asdict(estimate_needs(config, ranks.world_size, gpus=_count_gpus() > 0))
        except OneLLMError as error:
            unknown = [Fault("fail", "", error.what, error.do)]
    found = NodeReports(
        collected.nodes,
        collected.reports,
        collected.missing,
        collected.left_behind,
        collected.skews,
        needs,
    )
    faults = [*find_faults(found, options), *unknown]
    exclude = get_excluded_nodes(found, faults)
    result = result_to_json(found, faults, exclude, collected.seconds)
    text = json.dumps(result, indent=1)
    if not options.as_json:
        write_output(format_result(found, faults, exclude, collected.seconds), flush=True)
    else:
        write_output(text, flush=True)
    _write_exclude(options, exclude)
    if config is not None:
        _try_write(config.run.dir / run_files.PREFLIGHT, text + "\n")
    return EXIT_DONE if result["ok"] else EXIT_FAILED


def _report_missing_rank_0(
    options: PreflightOptions, ranks: Ranks, node: str, error: Exception
) -> None:
    """Without rank 0, one of the other ranks on each node reports it."""
    if ranks.local_rank != 0:
        return
    write_error(f"rank {ranks.rank}: {error}")
    if node:
        write_error(f"[fail] {node}: rank 0 never joined or is gone\nwithout it: --exclude={node}")
        _write_exclude(options, [node])


def _write_exclude(options: PreflightOptions, nodes: list[str]) -> None:
    """Write one line for `--exclude` and `scontrol update ExcNodeList=`, or an empty file."""
    if options.exclude_file is not None:
        _try_write(options.exclude_file, ",".join(nodes) + ("\n" if nodes else ""))


def _try_write(path: Path, text: str) -> None:
    """Write a file if possible: a full disk may be what the preflight has found."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        write_error(f"{path} could not be written: {error}")


def get_expected_nodes(env: Mapping[str, str]) -> dict[int, str]:
    """Rank -> node of a Slurm step, whether it joins or not; {} elsewhere."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if not nodes or not tasks:
        return {}
    try:
        names = [
            name
            for name, count in zip(expand_hosts(nodes), parse_tasks_per_node(tasks), strict=True)
            for _ in range(count)
        ]
    except (UsageError, ValueError):
        return {}
    return dict(enumerate(names))


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
