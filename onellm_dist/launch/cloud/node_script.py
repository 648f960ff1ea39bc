"""The script that each node of a job runs: start the ranks, and say what follows their end.

It does for a container what a Slurm job script does for a job, and asks the same module for the
decision. One exit code, `START_AGAIN`, asks for another start; every other one is final.
"""

from __future__ import annotations

import shlex

from onellm_dist.common import run_files
from onellm_dist.common.errors import EXIT_PREEMPTED
from onellm_dist.launch.cloud.job import CloudJob

START_AGAIN = EXIT_PREEMPTED
NO_DECISION = 70
"""Exit code of a node whose ranks ended and that heard nothing from the first node."""
PORT = 29500
LONGEST_WAIT_S = 300
"""Longest back-off: the nodes keep their GPUs while they wait."""
PATIENCE_S = 900
"""Seconds beyond the grace period in which the first node decides."""

SCRIPT = """\
set -u
export PYTHONSAFEPATH=1 # a random.py in this folder is not imported for Python's own
{place}
run_dir={run_dir}
{recipe}marks="$run_dir/{nodes_folder}" mine="$run_dir/{nodes_folder}/$node.started"
mkdir -p "$marks" && touch "$mine" || exit {no_decision}

# Asked to stop: an eviction, a drained node, a deleted job. torchrun would end its ranks without a
# checkpoint, so the request is the file `stop` on the shared volume. All ranks of all nodes see it
# at the end of a step, write a checkpoint and leave.
stop_asked=0
request_stop() {{
    [ "$stop_asked" != 0 ] || stop_asked=$(date +%s)
    touch "$run_dir/{stop}"
    echo "$(date +%FT%T) asked to stop: $run_dir/{stop}"
}}
trap request_stop TERM INT

# The first node records this start in the history of the run, and removes the exit.json of the one
# before.
if [ "$node" = 0 ]; then
    {after} begin "$run_dir" \\
        --ranks-per-node {ranks} --grace-period {grace} || exit {no_decision}
fi
export ONELLM_GRACE_PERIOD_S={grace} # the ranks warn of each checkpoint that takes longer

{python} -m torch.distributed.run \\
    --nnodes={nodes} --node-rank="$node" --nproc-per-node={ranks} \\
    --master-addr="$ONELLM_JOB_ADDRESS" --master-port="$ONELLM_JOB_PORT" \\
    --module onellm_dist.train {arguments} &
ranks=$!
# Not a plain `wait`: the trap must run while the ranks do. If the ranks of another node have ended,
# those of this one have the time of a checkpoint; then they are ended: they cannot continue alone.
alone=0
while kill -0 "$ranks" 2>/dev/null; do
    [ "$stop_asked" = 0 ] || touch "$run_dir/{stop}"
    if [ "$marks/ended" -nt "$mine" ]; then
        alone=$((alone + 1))
        [ "$alone" != {grace} ] || kill "$ranks" 2>/dev/null
    fi
    sleep 1 & wait $!
done
wait "$ranks"
status=$?
[ "$status" = 0 ] || touch "$marks/ended"

# The first node decides for all: the others wait for its exit code, and take it for theirs.
if [ "$node" != 0 ]; then
    [ "$status" != 0 ] || exit 0
    for ((i = 0; i < {patience}; i++)); do
        [ ! "$marks/exit_code" -nt "$mine" ] || exit "$(cat "$marks/exit_code")"
        sleep 1 & wait $!
    done
    echo "the first node has not said what follows"
    exit {no_decision}
fi

# torchrun does not pass exit codes on. What follows is decided from $run_dir/exit.json and the
# history in $run_dir/attempts.jsonl. done: the job ends. preempted: start again. failed: start
# again after a while, up to a limit, and never twice at the same step. wrong usage: halt.
read -r action delay code < <({after} end "$run_dir" \\
    --launcher-status "$status" --stop-asked "$stop_asked" --max-requeues {max_requeues})
if [ "${{action:-}}" = requeue ]; then
    [ "$code" != {again} ] || delay=0
    for ((i = 0; i < delay && i < {longest}; i++)); do
        [ "$stop_asked" = 0 ] || break
        sleep 1 & wait $!
    done
    code={again}
fi
echo "${{code:-1}}" >"$marks/.exit_code"
mv "$marks/.exit_code" "$marks/exit_code"
exit "${{code:-1}}"
"""


def render_node_script(job: CloudJob, *, place: str, recipe: str = "") -> str:
    """Render the script.

    Args:
        job: the job.
        place: lines that set `node` (0 is the first), ONELLM_JOB_ID, ONELLM_JOB_NODES,
            ONELLM_JOB_ADDRESS and ONELLM_JOB_PORT.
        recipe: lines that set `recipe` to the file of a recipe of the user's own.
    """
    python = shlex.quote(job.python)
    first = shlex.quote(job.recipe) if job.recipe else '"$recipe"'
    others = shlex.join([*job.overrides, f"run.dir={job.run_dir}"])
    return SCRIPT.format(
        place=place.rstrip("\n"),
        recipe=recipe,
        run_dir=shlex.quote(job.run_dir),
        nodes_folder=run_files.NODES,
        stop=run_files.STOP,
        after=f"{python} -m onellm_dist.launch.slurm.after",
        python=python,
        nodes=job.nodes,
        ranks=job.ranks_per_node,
        grace=job.grace_period_s,
        arguments=f"{first} {others}",
        max_requeues=job.max_requeues,
        patience=job.grace_period_s + PATIENCE_S,
        longest=LONGEST_WAIT_S,
        again=START_AGAIN,
        no_decision=NO_DECISION,
    )
