"""What the ranks of a job script run: a training run, or an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Program:
    """What a job script starts, and what it says about it."""

    module: str
    """The module that each rank runs."""
    after: str
    """The module that the script runs before and after each start; see `launch.slurm.after`."""
    subject: str
    """The heading of the script, in front of its first argument."""
    resumes: str
    """What resumes after a requeue."""
    grace: str
    """What must fit in the time before the limit."""
    stop: str
    """Comment: what the ranks do when the file `stop` is there."""
    begin: str
    """Comment: what is done before the ranks start."""
    export: str
    """What the ranks find in their environment; {grace_period_s} is replaced."""
    end: str
    """Comment: what is decided after they ended."""
    ends_together: bool
    """Whether a rank that fails ends the others."""


TRAINING = Program(
    module="onellm_dist.train",
    after="onellm_dist.launch.slurm.after",
    subject="Recipe",
    resumes="the run resumes",
    grace="the last checkpoint must fit in",
    stop="""\
# and torchrun do not pass signals on, so the request is the file `stop`, which works with every
# launcher. All ranks see it at the end of a step, write a checkpoint and leave. It is created here
# because a TERM that reaches launcher and script alike leaves no time for the loop below.
""",
    begin="""\
# Record this start in the history of the run and remove the exit.json of the one before. Warn if
# the last checkpoint would barely fit into the grace period.
""",
    export=(
        "export ONELLM_GRACE_PERIOD_S={grace_period_s} "
        "# the ranks warn of each checkpoint that takes longer\n"
    ),
    end="""\
# Launchers do not pass exit codes on reliably. What follows is decided from $run_dir/exit.json and
# the history in $run_dir/attempts.jsonl. done: the job ends. preempted: requeue. failed: requeue
# with a back-off, up to a limit, and never twice at the same step. wrong usage: halt.
""",
    ends_together=True,
)

EVALUATION = Program(
    module="onellm_dist.cli.evaluate_rank",
    after="onellm_dist.evaluation.after_start",
    subject="Evaluation of",
    resumes="what is missing is answered",
    grace="the batches in progress must fit in",
    stop="""\
# and torchrun do not pass signals on, so the request is the file `stop`, which works with every
# launcher. Each rank sees it at the end of a batch and leaves. It is created here because a TERM
# that reaches launcher and script alike leaves no time for the loop below.
""",
    begin="""\
# Record this start in the history of the evaluation.
""",
    export="",
    end="""\
# What follows is decided from the answers in $run_dir and the history in $run_dir/attempts.jsonl.
# All questions answered: the job ends. preempted: requeue. failed: requeue with a back-off, up to a
# limit of failures without a new answer. wrong usage: halt.
""",
    ends_together=False,
)

KEPT_CHECKPOINTS = replace(
    EVALUATION,
    module="onellm_dist.cli.evaluate_run",
    subject="Evaluation of the kept checkpoints of",
)
