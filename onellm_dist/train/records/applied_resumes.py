"""`checkpoint.resume=never`, or a path, is applied once per job.

The command line of a job comes again with each requeue, and the run must resume then.
`RUN_DIR/resume.json` says what was applied, by which job, and how often that had been restarted. A
later restart of the same job resumes as with `auto`. A command that is given again (by hand, or as
a new job) is applied again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.files import write_atomic
from onellm_dist.common.run_files import APPLIED_RESUMES
from onellm_dist.launch.slurm.attempts import RUNNING, read_attempts

LOCAL_RESTARTS_VARIABLE = "ONELLM_LOCAL_RESTARTS"
"""How often `onellm train` has started its local ranks again."""


def was_applied(run_dir: Path, wanted: str | Path, env: Mapping[str, str]) -> bool:
    """Whether an earlier start of this very job applied `checkpoint.resume`. Rank 0 asks.

    Args:
        run_dir: the run directory.
        wanted: `checkpoint.resume`.
        env: environment variables, which name the job.
    """
    try:
        found = json.loads((run_dir / APPLIED_RESUMES).read_text(encoding="utf-8"))
        now = _describe_start(run_dir, wanted, env)
        return bool(
            all(found[key] == now[key] for key in ("resume", "job"))
            and now["restarts"] > found["restarts"]
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def record_applied(run_dir: Path, wanted: str | Path, env: Mapping[str, str]) -> None:
    """Record, durably, that this start applied `checkpoint.resume`. Rank 0 calls it."""
    text = json.dumps(_describe_start(run_dir, wanted, env)) + "\n"
    write_atomic(run_dir / APPLIED_RESUMES, text)


def _describe_start(run_dir: Path, wanted: str | Path, env: Mapping[str, str]) -> dict[str, Any]:
    """`restarts` counts those of the Slurm job, and those of torchrun's agent or `onellm train`."""
    job = env.get("SLURM_JOB_ID", "")
    requeues = int(env.get("SLURM_RESTART_COUNT") or 0)
    if not job:
        # The deepspeed runner starts ranks through ssh, without Slurm's variables; the job script
        # has written a line before.
        started = read_attempts(run_dir)[-1:]
        if started and started[0].status == RUNNING:
            job = started[0].job_id
            requeues = started[0].restart_count
    # As it was typed: a link such as `latest` may point elsewhere when the job is requeued.
    agent = env.get("TORCHELASTIC_RESTART_COUNT") or env.get(LOCAL_RESTARTS_VARIABLE)
    resume = os.path.abspath(wanted) if isinstance(wanted, Path) else wanted
    return {
        "resume": resume,
        "job": job,
        "restarts": [requeues, int(agent or 0)],
    }
