"""Renders a job script that people can read, edit and keep."""

from __future__ import annotations

import shlex

from onellm_dist import __version__
from onellm_dist.common import run_files
from onellm_dist.common.counts import format_count
from onellm_dist.launch.arguments import encode_argument
from onellm_dist.launch.slurm.job import SlurmJob, SweepTask
from onellm_dist.launch.slurm.script_text import (
    BEGIN,
    DEFINE_EVALUATION,
    END,
    END_REMAINING_RANKS,
    EVALUATE,
    EXCLUDE_BAD_NODES,
    STOP_HANDLER,
    TASKS,
    WAIT,
)
from onellm_dist.launch.slurm.start_commands import (
    format_container_function,
    format_preflight,
    format_start,
)


def render(job: SlurmJob) -> str:
    """Render the whole script; the same job gives the same text."""
    enter = "in_container " if job.container else ""
    after = f"{enter}{shlex.quote(job.python)} -m {job.program.after}"
    begin = BEGIN.format(
        comment=job.program.begin,
        export=job.program.export.format(grace_period_s=job.grace_period_s),
        after=after,
        ranks_per_node=job.ranks_per_node,
        grace_period_s=job.grace_period_s,
    )
    parts = [
        _format_header(job),
        _format_run_dir(job),
        STOP_HANDLER.format(comment=job.program.stop),
        format_container_function(job),
        begin,
        _define_evaluation(job, enter) if job.evaluates else "",
        format_preflight(job) if job.preflight else "",
        _format_ranks(job),
        EVALUATE if job.evaluates else "",
        _format_end(job, after),
    ]
    return "\n".join(filter(None, parts))


def _format_header(job: SlurmJob) -> str:
    fewest, most = job.nodes
    nodes = str(fewest) if fewest == most else f"{fewest}-{most}"
    ranks = format_count(job.ranks_per_node, "rank")
    where = f"{nodes} nodes with {ranks} each" if nodes != "1" else f"1 node with {ranks}"
    what = f"{job.program.subject} {job.recipe}" if job.recipe else "Any recipe"
    if job.sweep:
        what = f"{len(job.sweep)} runs of recipe {job.recipe}, each"
    lines = [
        "#!/usr/bin/env bash",
        f"# {what} on {where}, started by {job.starter}.",
        f"# Rendered by onellm_dist {__version__}. It is yours: read it, edit it, keep it.",
    ]
    if not job.recipe:
        lines.append(f"#   {_format_usage(job)}")
    if job.command:
        lines.append(f"#   {job.command}")
    for option, comment in _list_options(job, nodes):
        lines.append(f"#SBATCH {option}" + (f"  # {comment}" if comment else ""))
    lines += [
        "",
        "# sbatch passes your environment on. If a cluster does not, or with --export=NONE, set it "
        "here:",
        "# source .venv/bin/activate",
        "export SLURM_EXPORT_ENV=ALL # the steps get this environment, also under --export=NONE",
        "export PYTHONSAFEPATH=1 # a random.py in this folder is not imported for Python's own",
        "# Micro-batches differ in size, and expandable segments are fragmented less by that.",
        '[ -n "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ] ||',
        "    export PYTORCH_ALLOC_CONF=expandable_segments:True",
        "set -u",
    ]
    return "\n".join(lines) + "\n"


def _list_options(job: SlurmJob, nodes: str) -> list[tuple[str, str]]:
    """The options of sbatch, each with a comment (or "")."""
    # There is no --ntasks-per-node: the steps name their tasks. With 1 per node, Slurm (22.05)
    # would give a job that asks for 1-4 nodes a single one; with more, a requeued job wants as many
    # tasks as its last start had, so it would never come back on fewer nodes.
    options = [(f"--job-name={job.name}", ""), (f"--nodes={nodes}", "")]
    if job.sweep:
        options.append(
            (f"--array=0-{len(job.sweep) - 1}", "one run each; %2 behind it: two at once")
        )
    if job.gpus_per_node:
        options.append((f"--gpus-per-node={job.gpus_per_node}", ""))
    if job.cpus_per_rank:
        options.append((f"--cpus-per-task={job.cpus_per_rank * job.ranks_per_node}", ""))
    else:
        options.append(("--exclusive", "whole nodes: only our ranks share their cores and memory"))
        options.append(("--mem=0", ""))
    for option in ("time", "partition", "account", "qos", "exclude"):
        if value := getattr(job, option):
            options.append((f"--{option}={value}", ""))
    return [
        *options,
        ("--requeue", f"a lost node or a preemption requeues the job; {job.program.resumes}"),
        ("--open-mode=append", "a requeued job appends to the same log"),
        (
            f"--signal=B:USR1@{job.grace_period_s}",
            f"seconds before the time limit: {job.program.grace}",
        ),
        (f"--output=%x-{'%A_%a' if job.sweep else '%j'}.log", ""),
    ]


def _format_usage(job: SlurmJob) -> str:
    return f"sbatch --nodes=2 {job.name}.sbatch RUN_DIR RECIPE [key=value ...]"


def _format_run_dir(job: SlurmJob) -> str:
    setting = f"run_dir={shlex.quote(str(job.run_dir))}\n"
    if not job.recipe:
        setting = f'run_dir="${{1:?usage: {_format_usage(job)}}}"\n'
    if job.sweep:
        tasks = "\n".join(_format_task(job, number) for number in range(len(job.sweep)))
        setting = TASKS.format(tasks=tasks)
    return (
        f'{setting}[ "${{run_dir#-}}" = "$run_dir" ] || run_dir=./$run_dir\nmkdir -p "$run_dir"\n'
    )


def _format_task(job: SlurmJob, number: int) -> str:
    """The branch of a task of an array: its run directory, and its overrides."""
    task: SweepTask = job.sweep[number]
    lines = [f"{number})", f"    run_dir={shlex.quote(str(task.run_dir))}"]
    lines.append(f"    varied=({shlex.join(task.overrides)})")
    if job.starter == "deepspeed":
        lines.append(f"    encoded=({shlex.join(map(encode_argument, task.overrides))})")
    return "\n".join([*lines, "    ;;"])


def _format_ranks(job: SlurmJob) -> str:
    """The commands that start the ranks and wait for them, if the preflight passes."""
    body = f"{format_start(job)}\n{WAIT}"
    if job.starter == "deepspeed":
        body += END_REMAINING_RANKS.format(grace_period_s=job.grace_period_s)
    if not job.preflight:
        return body
    return (
        'if [ "$preflight" = 0 ] && [ "$stop_asked" = 0 ]; then\n\n'
        f"{body}\nelse\n    status=1\nfi\n"
    )


def _define_evaluation(job: SlurmJob, enter: str) -> str:
    python, script = shlex.quote(job.python), run_files.EVALUATION_SCRIPT
    return DEFINE_EVALUATION.format(enter=enter, python=python, script=script)


def _format_end(job: SlurmJob, after: str) -> str:
    job_id = "array_task" if job.sweep else "SLURM_JOB_ID"
    more = f" \\\n    {shlex.join(job.end_arguments)}" if job.end_arguments else ""
    exclude = ""
    if job.preflight:
        more += ' \\\n    --preflight-status "$preflight"'
        exclude = EXCLUDE_BAD_NODES.format(
            bad_nodes=run_files.BAD_NODES,
            exclude=f",{job.exclude}" if job.exclude else "",
            job_id=job_id,
        )
    return END.format(
        comment=job.program.end,
        after=after,
        max_requeues=job.max_requeues,
        more=more,
        exclude=exclude,
        job_id=job_id,
    )
