"""The commands of a job script that start ranks and the preflight, in or out of a container."""

from __future__ import annotations

import shlex
from pathlib import Path

from onellm_dist.common import run_files
from onellm_dist.launch.arguments import encode_argument
from onellm_dist.launch.slurm.environment import FIRST_PORT, PORT_STRIDE, PORTS
from onellm_dist.launch.slurm.job import SlurmJob
from onellm_dist.launch.slurm.programs import TRAINING
from onellm_dist.launch.slurm.script_text import PREFLIGHT_WAIT, WAIT_FOR_SSH

PREFLIGHT_S = 3600
"""Longest time of a preflight; each of its checks has a limit of its own."""
CONTAINER_S = 600
"""Longest time of a short command in a container, whose image may have to be fetched first."""


def format_start(job: SlurmJob) -> str:
    """Format the commands that start the ranks in the background and set `$ranks`."""
    if job.starter == "srun":
        return _start_with_srun(job)
    return _start_with_torchrun(job) if job.starter == "torchrun" else _start_with_deepspeed(job)


def _start_with_srun(job: SlurmJob) -> str:
    together = job.program.ends_together
    failed = "If a rank fails, Slurm ends the others." if together else "Ranks end on their own."
    return (
        "# One process per rank, straight from Slurm: rank, world size and the address of rank 0\n"
        f"# are read from its variables. {failed} Ranks are not\n"
        "# bound to cores, because their loader workers need cores too.\n"
        + _format_srun(job, job.ranks_per_node, kill_on_bad_exit=together)
        + f"    {_format_apptainer(job)}{shlex.quote(job.python)} -u -m {_format_program(job)} "
        "&\nranks=$!\n"
    )


def _start_with_torchrun(job: SlurmJob) -> str:
    return (
        "# One torchrun per node, which starts one process per rank. They meet at the first node.\n"
        + _format_meeting_point()
        + _format_srun(job, 1, kill_on_bad_exit=True)
        + f"    {_format_apptainer(job)}{shlex.quote(job.python)} -m torch.distributed.run \\\n"
        f'    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={job.ranks_per_node} \\\n'
        '    --rdzv-backend=c10d --rdzv-endpoint="$first:$port" \\\n'
        '    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \\\n'
        f"    --module {_format_program(job)} &\nranks=$!\n"
    )


def _start_with_deepspeed(job: SlurmJob) -> str:
    runner = "deepspeed"
    if job.python != "python":
        runner = shlex.quote(str(Path(job.python).with_name(runner)))
    hostfile = f'"$run_dir/{run_files.HOSTFILE}"'
    return (
        "# The deepspeed runner starts the ranks through pdsh and ssh, so it needs ssh between\n"
        "# the nodes without a password. The hostfile is made from the allocation. Variables that\n"
        "# ssh does not carry over (PATH, NCCL settings) come from .deepspeed_env in the working\n"
        "# directory. Its arguments pass through a shell on each node: special characters are\n"
        "# encoded, and paths that it does not quote must have none.\n"
        f"{_format_path_check(runner)}{_format_encoding(job)}"
        + _format_meeting_point()
        + 'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)\n'
        'scontrol show hostnames "$SLURM_JOB_NODELIST" |\n'
        f"    sed 's/$/ slots={job.ranks_per_node}/' >{hostfile}\n"
        + WAIT_FOR_SSH
        + f"{{ nodes_answer && exec {runner} --hostfile {hostfile} --launcher pdsh \\\n"
        '    --master_addr "$first" --master_port "$port" --no_ssh_check \\\n'
        f"    --module {_format_encoded_program(job)}; }} &\nranks=$!\n"
    )


def _format_path_check(runner: str) -> str:
    """Refuse a job whose folder or Python the deepspeed runner would pass on unquoted."""
    return (
        f'case "$PWD:$(command -v {runner})" in\n'
        "*[!A-Za-z0-9_.,:/+=@%-]*)\n"
        '    echo "deepspeed cannot start from $PWD: it does not quote spaces and special '
        'characters; use --with srun" >&2\n'
        "    exit 2\n"
        "    ;;\n"
        "esac\n"
    )


def _format_encoding(job: SlurmJob) -> str:
    """Encode the arguments of a script that takes any recipe; "" for one with its own."""
    if job.recipe:
        return ""
    python = shlex.quote(job.python)
    return (
        f"mapfile -t arguments < <({python} -m onellm_dist.launch.arguments "
        '"${@:2}" run.dir="$run_dir")\n'
    )


def _format_encoded_program(job: SlurmJob) -> str:
    if not job.recipe:
        return f'{job.program.module} "${{arguments[@]}}"'
    arguments = shlex.join(map(encode_argument, [job.recipe, *job.overrides]))
    varied = ' "${encoded[@]}"' if job.sweep else ""
    return f"{job.program.module} {arguments}{varied}"


def format_preflight(job: SlurmJob) -> str:
    """Format the commands that check every node and set `$preflight` to the exit code."""
    recipe = f" --recipe {_format_arguments(job)}" if job.program is TRAINING else ""
    return (
        "# Before GPU time is spent, every node is checked (GPUs, links, clocks, versions,\n"
        "# memory, disks). Bad nodes are listed in a file, and avoided at the next start.\n"
        f'bad_nodes="$run_dir/{run_files.BAD_NODES}.$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}"\n'
        f"timeout --foreground --kill-after=30 {PREFLIGHT_S} \\\n    "
        + _format_srun(job, job.ranks_per_node, kill_on_bad_exit=False)
        + f"    {_format_apptainer(job)}{shlex.quote(job.python)} "
        "-u -m onellm_dist.cli doctor --distributed \\\n"
        f'    --exclude-file "$bad_nodes"{recipe} &\n' + PREFLIGHT_WAIT
    )


def format_container_function(job: SlurmJob) -> str:
    """Format a shell function that runs a short command in the container; "" without one."""
    if not job.container:
        return ""
    if job.container_runtime == "apptainer":
        enter = _format_apptainer(job)
    else:
        step = "srun --nodes=1 --ntasks=1 --overlap"
        enter = f"timeout {CONTAINER_S} {step}{_format_pyxis(job)} \\\n    "
    return f'# The package is installed in the container.\nin_container() {{\n    {enter}"$@"\n}}\n'


def _format_srun(job: SlurmJob, tasks_per_node: int, *, kill_on_bad_exit: bool) -> str:
    """The first lines of a step on all nodes.

    The tasks are given to Slurm again, because the step may have other numbers than the job.
    """
    tasks = '"$SLURM_JOB_NUM_NODES"'
    if tasks_per_node > 1:
        tasks = f"$((SLURM_JOB_NUM_NODES * {tasks_per_node}))"
    options = f"--cpu-bind=none --kill-on-bad-exit={int(kill_on_bad_exit)}"
    if job.cpus_per_rank:
        # To Slurm the job is one task per node with the cores of all its ranks. Whether a step
        # inherits that depends on Slurm's version.
        cores = job.cpus_per_rank * job.ranks_per_node // tasks_per_node
        options += f" \\\n    --cpus-per-task={cores}"
    return (
        f'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks={tasks} '
        f"--ntasks-per-node={tasks_per_node} \\\n    {options}{_format_pyxis(job)} \\\n"
    )


def _format_meeting_point() -> str:
    return (
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        "# Jobs that share a node must not share a port, nor may two starts of a job.\n"
        f"port=$(({FIRST_PORT} + "
        f"(SLURM_JOB_ID + {PORT_STRIDE} * ${{SLURM_RESTART_COUNT:-0}}) % {PORTS}))\n"
    )


def _format_program(job: SlurmJob) -> str:
    arguments = _format_arguments(job) if job.recipe else '"${@:2}" run.dir="$run_dir"'
    if job.program is TRAINING and job.starter == "srun" and job.ranks_per_node == 1:
        # A step of one task looks like an interactive shell, in which `onellm train` would start
        # local ranks.
        arguments += " launch.ranks=1"
    return f"{job.program.module} {arguments}"


def _format_arguments(job: SlurmJob) -> str:
    varied = ' "${varied[@]}"' if job.sweep else ""
    return shlex.join([job.recipe, *job.overrides]) + varied


def _format_mounts(job: SlurmJob) -> list[str]:
    return ['"$PWD"', *(shlex.quote(path) for path in job.mounts)]


def _format_pyxis(job: SlurmJob) -> str:
    """The options of `srun` that start its tasks in a container; "" without pyxis."""
    if not job.container or job.container_runtime != "pyxis":
        return ""
    mounts = ",".join(f"{path}:{path}" for path in _format_mounts(job))
    return (
        f" \\\n    --container-image={shlex.quote(job.container)}"
        f' --container-mounts={mounts} --container-workdir="$PWD"'
    )


def _format_apptainer(job: SlurmJob) -> str:
    """The command in front of one that runs in a container; "" without apptainer."""
    if not job.container or job.container_runtime != "apptainer":
        return ""
    nv = " --nv" if job.gpus_per_node else ""
    binds = " ".join(f"--bind {path}" for path in _format_mounts(job))
    return f'apptainer exec{nv} {binds} --pwd "$PWD" {shlex.quote(job.container)} \\\n    '
