"""The fixed parts of a job script, in bash."""

from __future__ import annotations

AFTER_RESULT_S = 30
"""Seconds that a preflight may still run after it has written its result."""

TASKS = """\
# One run for each task of the array: its directory, and the keys in which it differs.
case "${{SLURM_ARRAY_TASK_ID:?submit this script with sbatch: it is an array}}" in
{tasks}
*)
    echo "there is no task $SLURM_ARRAY_TASK_ID in this script" >&2
    exit 2
    ;;
esac
array_task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID may stand for the whole array
"""

STOP_HANDLER = """\
# Asked to stop (USR1 ahead of the time limit; USR1 or TERM at a preemption). The deepspeed runner
{comment}stop_asked=0
request_stop() {{
    [ "$stop_asked" != 0 ] || stop_asked=$(date +%s)
    touch "$run_dir/stop"
    echo "$(date +%FT%T) asked to stop: $run_dir/stop"
}}
trap request_stop USR1 TERM
"""

BEGIN = """\
{comment}{after} begin "$run_dir" \\
    --ranks-per-node {ranks_per_node} --grace-period {grace_period_s} || exit 1
{export}"""

WAIT = """\
# Not a plain `wait`: the trap must run while the ranks do. The file is touched until they are gone,
# because ranks that are only just starting remove a stop file that they find.
while kill -0 "$ranks" 2>/dev/null; do
    [ "$stop_asked" = 0 ] || touch "$run_dir/stop"
    sleep 1 & wait $!
done
wait "$ranks"
status=$?
"""

PREFLIGHT_WAIT = f"""\
preflight_pid=$! patience={AFTER_RESULT_S}
# The file of bad nodes is the result. Once it is there, a stuck node must not hold up the others.
# A stop ends the preflight at once.
while kill -0 "$preflight_pid" 2>/dev/null; do
    [ ! -e "$bad_nodes" ] || patience=$((patience - 1))
    {{ [ "$stop_asked" = 0 ] && [ "$patience" -gt 0 ]; }} || kill "$preflight_pid" 2>/dev/null
    sleep 1 & wait $!
done
wait "$preflight_pid"
preflight=$?
"""

WAIT_FOR_SSH = """\
# A node that has just joined may not accept ssh yet. Its ranks would never start, and those of the
# other nodes would wait for them.
nodes_answer() {
    for ((i = 0; i < 20; i++)); do
        timeout 30 pdsh -S -R ssh -w "$hosts" true >/dev/null 2>&1 && return
        sleep 2
    done
    echo "no ssh to every node of $hosts: try pdsh -S -R ssh -w $hosts true"
    return 1
}
"""

END_REMAINING_RANKS = """
# The runner may end before its ranks. They run under ssh, where Slurm neither signals nor ends
# them, and would keep the run locked. After a stop they have the grace period to leave.
# Then, or if the runner failed, their launchers get a TERM and end them within 30 s.
on_nodes() {{ # on_nodes pgrep|pkill: the launchers of this start
    local pattern="[d]eepspeed.launcher.launch .*--master_port=$port "
    timeout 30 pdsh -R ssh -w "$hosts" "$1 -u $(id -u) -f '$pattern'" 2>/dev/null
}}
for ((i = 0; i < {grace_period_s}; i++)); do
    {{ [ "$stop_asked" != 0 ] && on_nodes pgrep | grep -q .; }} || break
    touch "$run_dir/stop"
    sleep 1 & wait $!
done
if on_nodes pgrep | grep -q .; then
    echo "ranks were left on the nodes: ending them"
    on_nodes pkill
    for ((i = 0; i < 40; i++)); do
        on_nodes pgrep | grep -q . || break
        sleep 1 & wait $!
    done
fi
"""

DEFINE_EVALUATION = """\
# Checkpoints that are kept answer data.validation.tasks in a job of their own, one job at a time.
submit_evaluation() {{
    [ -e "$run_dir/{script}" ] &&
        {enter}{python} -m onellm_dist.cli evaluate-run --check "$run_dir" &&
        sbatch --dependency=singleton "$run_dir/{script}"
}}
# Those of a start that was asked to stop, which had no time for it.
[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || submit_evaluation
"""

EVALUATE = """\
# The time after a request to stop is for what follows: the next start submits the evaluation.
[ "$stop_asked" != 0 ] || submit_evaluation
"""

END = """\
{comment}read -r action delay code < <({after} end "$run_dir" \\
    --launcher-status "$status" --stop-asked "$stop_asked" --max-requeues {max_requeues}{more})
if [ "${{action:-}}" = requeue ]; then
    # RUNNING: the job is still ours. It is not after scancel, and a preemption by REQUEUE has
    # requeued it already.
    if [ "$(squeue --noheader --job "${job_id}" --format=%T)" = RUNNING ]; then
        trap '' TERM # requeueing ends this script too, and another line has to run
        scontrol requeue "${job_id}"
        # Slurm's own delay is two minutes.
        scontrol update JobId="${job_id}" StartTime="now+$delay"
{exclude}    else
        echo "not requeued from here: the job is already being cancelled or requeued"
    fi
fi
exit "${{code:-1}}"
"""

EXCLUDE_BAD_NODES = """\
        bad=$(cat "$run_dir/{bad_nodes}.$SLURM_JOB_ID".* 2>/dev/null | sort -u | paste -sd,)
        [ -z "$bad" ] || scontrol update JobId="${job_id}" ExcNodeList="$bad{exclude}"
"""
