"""Renders a job script that people can read, edit and keep."""

from __future__ import annotations

import shlex
from pathlib import Path

from onellm_dist import __version__
from onellm_dist.launch.slurm.environment import FIRST_PORT, PORT_STRIDE, PORTS
from onellm_dist.launch.slurm.job import Job

PREFLIGHT_S, AFTER_VERDICT_S, CONTAINER_S = 3600, 30, 600
"""Longest time of a preflight (each of its phases has a limit of its own), of its end after the verdict, and of a short command of ours in
a container (whose image may have to be fetched)."""

_ASK = """\
# Asked to stop (USR1 ahead of the time limit; USR1 or TERM at a preemption): the file `stop` is what every way of starting understands,
# for the deepspeed runner and torchrun do not pass signals on. All ranks see it at the end of a step, write a checkpoint and leave.
# It is touched here, for a TERM that reaches launcher and script alike leaves no time for the loop below.
stop_asked=0
trap '[ "$stop_asked" != 0 ] || stop_asked=$(date +%s); touch "$run_dir/stop"; echo "$(date +%FT%T) asked to stop: $run_dir/stop"' USR1 TERM
"""

_WAIT = """\
# Not a plain `wait`: the trap must run while the ranks do. The file is touched until they are gone, since ranks that are only just
# starting remove one that they find.
while kill -0 "$ranks" 2>/dev/null; do
    [ "$stop_asked" = 0 ] || touch "$run_dir/stop"
    sleep 1 & wait $!
done
wait "$ranks"
status=$?
"""

_PREFLIGHT_WAIT = f"""\
preflight_pid=$! patience={AFTER_VERDICT_S}
# The verdict is in once the file is there: a stuck node must not hold up the others. A stop ends the preflight at once.
while kill -0 "$preflight_pid" 2>/dev/null; do
    [ ! -e "$bad_nodes" ] || patience=$((patience - 1))
    {{ [ "$stop_asked" = 0 ] && [ "$patience" -gt 0 ]; }} || kill "$preflight_pid" 2>/dev/null
    sleep 1 & wait $!
done
wait "$preflight_pid"
preflight=$?
"""

_SSH = """\
# A node that has only just come (back) may not let ssh in yet. Its ranks would never start, and those of the others would wait for them.
nodes_answer() {
    for ((i = 0; i < 20; i++)); do
        timeout 30 pdsh -S -R ssh -w "$hosts" true >/dev/null 2>&1 && return
        sleep 2
    done
    echo "no ssh to every node of $hosts: look with pdsh -S -R ssh -w $hosts true"
    return 1
}
"""

_LEFT = """
# The runner may end before its ranks: they are under ssh, where Slurm neither tells nor ends them, and they would hold the run. Asked to
# stop, they have the grace period for their checkpoint; then, or where the runner failed, their launchers are told to end them
# (within 30 s).
on_nodes() {{ # on_nodes pgrep|pkill: this start's launchers
    timeout 30 pdsh -R ssh -w "$hosts" "$1 -u $(id -u) -f '[d]eepspeed.launcher.launch .*--master_port=$port '" 2>/dev/null
}}
for ((i = 0; i < {grace}; i++)); do
    {{ [ "$stop_asked" != 0 ] && on_nodes pgrep | grep -q .; }} || break
    touch "$run_dir/stop"
    sleep 1 & wait $!
done
if on_nodes pgrep | grep -q .; then
    echo "ranks were left on the nodes: they are ended"
    on_nodes pkill
    for ((i = 0; i < 40; i++)); do
        on_nodes pgrep | grep -q . || break
        sleep 1 & wait $!
    done
fi
"""

_AFTER = """\
# Launchers blur exit codes, so the verdict comes from $run_dir/exit.json and the starts before this one ($run_dir/attempts.jsonl):
# done; preempted: requeue; failed: requeue with a back-off, but not for ever, and never twice at the same step; wrong usage: halt.
read -r verdict delay code < <({tool} end "$run_dir" \\
    --launcher-status "$status" --stop-asked "$stop_asked" --max-requeues {max_requeues}{told})
if [ "${{verdict:-}}" = requeue ]; then
    # RUNNING: the job is still ours. After scancel it is not, and a preemption by REQUEUE has requeued it already.
    if [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        trap '' TERM # requeueing ends this script too; one more line is to be run
        scontrol requeue "$SLURM_JOB_ID"
        scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$delay" # Slurm's own delay is two minutes
{exclude}    else
        echo "not requeued from here: the job is being cancelled or requeued already"
    fi
fi
exit "${{code:-1}}"
"""

_EXCLUDE = """\
        bad=$(cat "$run_dir/bad_nodes.$SLURM_JOB_ID".* 2>/dev/null | sort -u | paste -sd,)
        [ -z "$bad" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$bad{exclude}"
"""


def render(job: Job) -> str:
    """The whole script; the same job gives the same text."""
    tool = (
        f"{'in_container ' if job.container else ''}{job.python} -m onellm_dist.launch.slurm.after"
    )
    parts = [
        _header(job),
        _run_dir(job),
        _ASK,
        _in_container(job),
        "# This start goes into the history of the run, and the exit.json of an earlier one goes away; a grace period too short for the\n"
        "# last checkpoint is told.\n"
        f'{tool} begin "$run_dir" --ranks-per-node {job.ranks_per_node} --grace-period {job.grace_period_s} || exit 1\n'
        f"export ONELLM_GRACE_PERIOD_S={job.grace_period_s} # each checkpoint that takes longer is warned of\n",
    ]
    if job.preflight:
        parts.append(_preflight(job))
    told = ' \\\n    --preflight-status "$preflight"' if job.preflight else ""
    exclude = (
        _EXCLUDE.format(exclude=f",{job.exclude}" if job.exclude else "") if job.preflight else ""
    )
    parts += [
        _guarded(job),
        _AFTER.format(tool=tool, max_requeues=job.max_requeues, told=told, exclude=exclude),
    ]
    return "\n".join(filter(None, parts))


def _header(job: Job) -> str:
    least, most = job.nodes
    nodes = str(least) if least == most else f"{least}-{most}"
    options = [
        # No --ntasks-per-node: the steps name their tasks. With 1 a node, Slurm (22.05) would give a job that asks for 1-4 nodes a single
        # one; with more, a requeued job wants as many tasks as its last start had, so it never comes back on fewer nodes.
        f"--job-name={job.name}",
        f"--nodes={nodes}",
        f"--gpus-per-node={job.gpus_per_node}" if job.gpus_per_node else "",
        f"--cpus-per-task={job.cpus_per_rank * job.ranks_per_node}"
        if job.cpus_per_rank
        else "--exclusive",
        "" if job.cpus_per_rank else "--mem=0",
        f"--time={job.time}",
        f"--partition={job.partition}" if job.partition else "",
        f"--account={job.account}" if job.account else "",
        f"--qos={job.qos}" if job.qos else "",
        f"--exclude={job.exclude}" if job.exclude else "",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{job.grace_period_s}",
        "--output=%x-%j.log",
    ]
    about = {
        "--exclusive": "whole nodes: their cores and memory are shared by our ranks alone",
        "--requeue": "a lost node or a preemption puts the job back into the queue; the run goes on from its newest checkpoint",
        "--open-mode=append": "a requeued job writes on in the same log",
        f"--signal=B:USR1@{job.grace_period_s}": "seconds before the time limit, to this script: the last checkpoint must fit in",
    }
    what = (
        job.recipe or "any recipe (sbatch --nodes=2 generic.sbatch RUN_DIR RECIPE [key=value ...])"
    )
    ranks = f"{job.ranks_per_node} rank{'s' if job.ranks_per_node > 1 else ''}"
    lines = [
        "#!/usr/bin/env bash",
        f"# {what} on {nodes} node{'s' if nodes != '1' else ''} with {ranks} each, started by {job.starter}.",
    ]
    lines.append(
        f"# Rendered by onellm_dist {__version__}; it is yours: read it, edit it, keep it."
    )
    if job.command:
        lines.append(f"#   {job.command}")
    for option in filter(None, options):
        lines.append(f"#SBATCH {option}" + (f"  # {about[option]}" if option in about else ""))
    lines += [
        "",
        "# sbatch hands your environment on. Where a cluster does not, set it here: source .venv/bin/activate",
        "set -u",
    ]
    return "\n".join(lines) + "\n"


def _run_dir(job: Job) -> str:
    usage = f"usage: sbatch --nodes=2 {job.name}.sbatch RUN_DIR RECIPE [key=value ...]"
    where = f'"${{1:?{usage}}}"' if not job.recipe else shlex.quote(str(job.run_dir))
    return f'run_dir={where}\nmkdir -p "$run_dir"\n'


def _start(job: Job) -> str:
    return {"srun": _with_srun, "torchrun": _with_torchrun, "deepspeed": _with_deepspeed}[
        job.starter
    ](job)


def _with_srun(job: Job) -> str:
    return (
        "# One process a GPU, straight from Slurm: rank, world size and the address of rank 0 are read from its variables. When a rank\n"
        "# fails, Slurm ends the others. Cores are not bound to ranks, for a rank's loader workers need them too.\n"
        + _srun(job, job.ranks_per_node, " --kill-on-bad-exit=1")
        + f"    {_inside(job)}{job.python} -u -m {_training(job)} &\nranks=$!\n"
    )


def _with_torchrun(job: Job) -> str:
    return (
        "# One torchrun a node, which starts a process a GPU; they meet at the first node.\n"
        + _first_node()
        + _srun(job, 1, " --kill-on-bad-exit=1")
        + f"    {_inside(job)}{job.python} -m torch.distributed.run \\\n"
        f'    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={job.ranks_per_node} --rdzv-backend=c10d \\\n'
        '    --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \\\n'
        f"    --module {_training(job)} &\nranks=$!\n"
    )


def _with_deepspeed(job: Job) -> str:
    deepspeed = (
        "deepspeed" if job.python == "python" else str(Path(job.python).with_name("deepspeed"))
    )
    return (
        "# The deepspeed runner starts the ranks through pdsh and ssh, so it needs ssh between nodes without a password. The hostfile is\n"
        "# made from the allocation; what ssh does not hand on (PATH, NCCL settings) stands in .deepspeed_env in the working directory.\n"
        + _first_node()
        + 'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)\n'
        f'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed \'s/$/ slots={job.ranks_per_node}/\' >"$run_dir/hostfile"\n'
        + _SSH
        + f'{{ nodes_answer && exec {deepspeed} --hostfile "$run_dir/hostfile" --launcher pdsh \\\n'
        f'    --master_addr "$first" --master_port "$port" --no_ssh_check \\\n    --module {_training(job)}; }} &\nranks=$!\n'
    )


def _srun(job: Job, tasks_per_node: int, more: str) -> str:
    """The first lines of a step over all nodes; Slurm must be told the tasks again, for the step may start other numbers than the job."""
    tasks = (
        '"$SLURM_JOB_NUM_NODES"'
        if tasks_per_node == 1
        else f"$((SLURM_JOB_NUM_NODES * {tasks_per_node}))"
    )
    first = (
        f'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks={tasks} --ntasks-per-node={tasks_per_node}'
    )
    # The job is one task a node to Slurm, of all its ranks' cores; whether a step inherits that depends on Slurm's version.
    cpus = (
        f" \\\n    --cpus-per-task={job.cpus_per_rank * job.ranks_per_node // tasks_per_node}"
        if job.cpus_per_rank
        else ""
    )
    return f"{first} --cpu-bind=none{more}{cpus}{_pyxis(job)} \\\n"


def _first_node() -> str:
    return (
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        "# Jobs that share a node must not share a port, nor two starts of a job.\n"
        f"port=$(({FIRST_PORT} + (SLURM_JOB_ID + {PORT_STRIDE} * ${{SLURM_RESTART_COUNT:-0}}) % {PORTS}))\n"
    )


def _preflight(job: Job) -> str:
    return (
        "# Before GPUs are paid for: every node is looked at (GPUs, links, clocks, versions, memory, disks). Bad ones are named, and kept\n"
        "# away from at the next start.\n"
        'bad_nodes="$run_dir/bad_nodes.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"\n'
        f"timeout --foreground --kill-after=30 {PREFLIGHT_S} \\\n    "
        + _srun(job, job.ranks_per_node, " --kill-on-bad-exit=0")
        + f'    {_inside(job)}{job.python} -u -m onellm_dist.cli doctor --distributed --exclude-file "$bad_nodes" \\\n'
        f"    --recipe {_arguments(job)} &\n" + _PREFLIGHT_WAIT
    )


def _guarded(job: Job) -> str:
    """Start the ranks and wait for them, where the preflight lets them."""
    body = f"{_start(job)}\n{_WAIT}{_LEFT.format(grace=job.grace_period_s) if job.starter == 'deepspeed' else ''}"
    if not job.preflight:
        return body
    return f'if [ "$preflight" = 0 ] && [ "$stop_asked" = 0 ]; then\n\n{body}\nelse\n    status=1\nfi\n'


def _training(job: Job) -> str:
    # A step of one task looks like an interactive shell, where local ranks are wanted: say how many.
    alone = " launch.ranks=1" if job.starter == "srun" and job.ranks_per_node == 1 else ""
    return (
        "onellm_dist.train "
        + (_arguments(job) if job.recipe else '"${@:2}" run.dir="$run_dir"')
        + alone
    )


def _arguments(job: Job) -> str:
    return " ".join([shlex.quote(job.recipe), *(shlex.quote(item) for item in job.overrides)])


def _mounts(job: Job) -> list[str]:
    return ['"$PWD"', *(shlex.quote(path) for path in job.mounts)]


def _pyxis(job: Job) -> str:
    if not job.container or job.container_runtime != "pyxis":
        return ""
    mounts = ",".join(f"{path}:{path}" for path in _mounts(job))
    return f' \\\n    --container-image={shlex.quote(job.container)} --container-mounts={mounts} --container-workdir="$PWD"'


def _inside(job: Job) -> str:
    if not job.container or job.container_runtime != "apptainer":
        return ""
    nv = " --nv" if job.gpus_per_node else ""
    binds = " ".join(f"--bind {path}" for path in _mounts(job))
    return f'apptainer exec{nv} {binds} --pwd "$PWD" {shlex.quote(job.container)} \\\n    '


def _in_container(job: Job) -> str:
    """A shell function for commands of ours in the job script itself; nothing without a container."""
    if not job.container:
        return ""
    enter = (
        _inside(job)
        if job.container_runtime == "apptainer"
        else f"timeout {CONTAINER_S} srun --nodes=1 --ntasks=1 --overlap{_pyxis(job)} \\\n    "
    )
    return f'# The package lives in the container.\nin_container() {{\n    {enter}"$@"\n}}\n'
