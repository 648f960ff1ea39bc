"""`onellm doctor --distributed`: as a rank of some launcher, or alone (then it starts local ranks itself)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, UsageError
from onellm_dist.config.load import load_config
from onellm_dist.config.schema import RunConfig
from onellm_dist.diagnostics.preflight.options import Options, node_name, pretence_of
from onellm_dist.launch.local import end_with_parent, find_free_port, launch_local
from onellm_dist.launch.ranks import Ranks, discover_ranks
from onellm_dist.launch.slurm.environment import expand_hosts, parse_tasks_per_node

RESULT = "preflight.json"
"""In run.dir, where a recipe is given."""
TOLD = "ONELLM_PREFLIGHT_TOLD"
"""Where a local rank 0 leaves the exit code for the process that started it."""


def run_preflight(options: Options, *, local_ranks: int | None = None) -> int:
    """Look at every node. In a process that a launcher started, it does not return.

    Returns:
        0: ready; 1: something would break or slow the run.

    Raises:
        UsageError: the recipe is wrong, or what the launcher set is.
    """
    config = load_config(options.recipe, options.overrides) if options.recipe else None
    ranks = discover_ranks()
    if ranks is None:
        count = local_ranks or (config.launch.ranks if config else None) or _gpus() or 1
        if count > 1:
            return _start_local(options, count)
        ranks = Ranks(0, 1, 0, 1, "127.0.0.1", find_free_port())
    end_with_parent()
    code = _as_rank(options, config, ranks)
    sys.stdout.flush()
    sys.stderr.flush()
    told = os.environ.get(TOLD)
    if told:
        if ranks.rank == 0:
            Path(told).write_text(str(code), encoding="ascii")
        code = EXIT_DONE  # the parent has the verdict; a failing rank would be reported as a crash
    os._exit(code)  # a stuck disk or collective would hold up Python's own end


def _start_local(options: Options, count: int) -> int:
    with tempfile.TemporaryDirectory(prefix="onellm-preflight-") as folder:
        told = Path(folder) / "code"
        os.environ[TOLD] = str(told)
        try:
            code = launch_local(
                [
                    sys.executable,
                    "-u",
                    "-m",
                    "onellm_dist.diagnostics.preflight",
                    json.dumps(_plain(options)),
                ],
                count,
                Path(folder),
            )
        finally:
            del os.environ[TOLD]
        return int(told.read_text(encoding="ascii")) if told.exists() else code or EXIT_FAILED


def _plain(options: Options) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(options).items()
    }


def options_from(text: str) -> Options:
    """The options that `_start_local` handed to a local rank."""
    given = json.loads(text)
    for key in ("recipe", "exclude_file"):
        given[key] = Path(given[key]) if given[key] else None
    return Options(**{**given, "overrides": tuple(given["overrides"])})


def _as_rank(options: Options, config: RunConfig | None, ranks: Ranks) -> int:
    from onellm_dist.diagnostics.preflight.rank import Rank, roll_call
    from onellm_dist.diagnostics.preflight.rendezvous import Meeting

    started = time.perf_counter()
    pretence = pretence_of()
    node, expected = node_name(pretence), expected_nodes(os.environ)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        meeting = Meeting(ranks, options.wait, agent=agent)
        team, missing = roll_call(meeting, ranks, node, options, expected)
        if team is None:
            print(
                f"rank {ranks.rank} on {node} came too late: the others went on without it",
                file=sys.stderr,
            )
            return EXIT_FAILED
        own = Rank(meeting, ranks, team, node, options, pretence)
        own.look_around(config)
        skews: dict[str, float] = {}
        if own.enter("own checks"):
            if config is not None:
                own.share_directory(config)
            skews = own.compare_clocks()
            own.try_links()
        meeting.put(f"report/{ranks.rank}", own.report)
        if ranks.rank != 0:
            code = int(
                meeting.get("verdict", options.limit * 2 + options.wait)
            )  # rank 0 imports the model's classes
            meeting.put(f"bye/{ranks.rank}", True)
            return code
        reports = meeting.collect("report", team.present, options.limit)
        team.left_behind |= {rank: "the end" for rank in team.present if rank not in reports}
        code = _conclude(
            options,
            config,
            ranks,
            reports,
            missing,
            team.left_behind,
            skews,
            dict(team.nodes),
            time.perf_counter() - started,
        )
        meeting.put("verdict", code)
        meeting.collect("bye", [r for r in team.present if r != 0], 5.0)
        return code
    except (
        OneLLMError,
        TimeoutError,
    ) as error:  # rank 0 never came, or is gone: each of the others can say so
        _rank_0_is_gone(options, ranks, expected.get(0, ""), error)
        return EXIT_FAILED


def _conclude(
    options: Options,
    config: RunConfig | None,
    ranks: Ranks,
    reports: Mapping[int, Mapping[str, Any]],
    missing: Mapping[int, str],
    left_behind: Mapping[int, str],
    skews: Mapping[str, float],
    nodes: dict[str, list[int]],
    seconds: float,
) -> int:
    """Rank 0's verdict: printed, written, and turned into the exit code."""
    from onellm_dist.diagnostics.preflight.diagnosis import Fault, Findings, excluded, judge
    from onellm_dist.diagnostics.preflight.requirements import needs_of
    from onellm_dist.diagnostics.preflight.table import json_of, text_of

    for rank, name in missing.items():
        if name:
            nodes.setdefault(name, []).append(rank)
    needs, unknown = None, list[Fault]()
    try:
        needs = asdict(needs_of(config, ranks.world_size, gpus=_gpus() > 0)) if config else None
    except OneLLMError as error:
        unknown = [Fault("fail", "", error.what, error.do)]
    found = Findings(nodes, reports, missing, left_behind, skews, needs)
    faults = [*judge(found, options), *unknown]
    exclude = excluded(found, faults)
    result = json_of(found, faults, exclude, seconds)
    print(
        json.dumps(result, indent=1)
        if options.as_json
        else text_of(found, faults, exclude, seconds),
        flush=True,
    )
    _write_exclude(options, exclude)
    if config is not None:
        _try_write(config.run.dir / RESULT, json.dumps(result, indent=1) + "\n")
    return EXIT_DONE if result["ok"] else EXIT_FAILED


def _rank_0_is_gone(options: Options, ranks: Ranks, node: str, error: Exception) -> None:
    """Every rank that is left says it, once a node."""
    if ranks.local_rank == 0:
        print(f"rank {ranks.rank}: {error}", file=sys.stderr)
        if node:
            print(
                f"[fail] {node}: rank 0 never came or is gone\nwithout it: --exclude={node}",
                file=sys.stderr,
            )
            _write_exclude(options, [node])


def _write_exclude(options: Options, nodes: list[str]) -> None:
    """One line as `--exclude` and `scontrol update ExcNodeList=` take it; empty where no node is to blame."""
    if options.exclude_file is not None:
        _try_write(options.exclude_file, ",".join(nodes) + ("\n" if nodes else ""))


def _try_write(path: Path, text: str) -> None:
    """A full disk is what the preflight may have found: it must not hide the verdict."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr)


def expected_nodes(env: Mapping[str, str]) -> dict[int, str]:
    """Rank -> node of a Slurm step, whoever came; {} elsewhere."""
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


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
