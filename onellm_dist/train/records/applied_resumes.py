"""`checkpoint.resume=never`, or a path, is obeyed once a job: its command line comes again with each requeue, and the run must go on then.

`RUN_DIR/resume.json` says what was obeyed, by which job, and how often that had been restarted. A later restart of the same job goes on as
with `auto`. A command that is given again (by hand, or as a new job) is obeyed again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onellm_dist.common.files import sync
from onellm_dist.launch.slurm.attempts import RUNNING, read_attempts

RECORD = "resume.json"


def was_obeyed(run_dir: Path, wanted: str | Path, env: Mapping[str, str]) -> bool:
    """Whether an earlier start of this very job did what `checkpoint.resume` says. Rank 0 asks."""
    try:
        found = json.loads((run_dir / RECORD).read_text(encoding="utf-8"))
        now = _this_start(run_dir, wanted, env)
        return bool(
            all(found[key] == now[key] for key in ("resume", "job"))
            and now["restarts"] > found["restarts"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def note_obeyed(run_dir: Path, wanted: str | Path, env: Mapping[str, str]) -> None:
    """Record, durably, that this start did what `checkpoint.resume` says. Rank 0 calls it."""
    aside = run_dir / f".{RECORD}.partial"
    aside.write_text(json.dumps(_this_start(run_dir, wanted, env)) + "\n", encoding="utf-8")
    sync(aside)
    aside.replace(run_dir / RECORD)
    sync(run_dir)


def _this_start(run_dir: Path, wanted: str | Path, env: Mapping[str, str]) -> dict[str, Any]:
    """`restarts`: of the Slurm job, and of torchrun's agent."""
    job, requeues = env.get("SLURM_JOB_ID", ""), int(env.get("SLURM_RESTART_COUNT") or 0)
    if not job:  # the deepspeed runner starts ranks through ssh, without Slurm's variables; the job script wrote a line before
        started = read_attempts(run_dir)[-1:]
        if started and started[0].status == RUNNING:
            job, requeues = started[0].job_id, started[0].restart_count
    resume = str(wanted.resolve()) if isinstance(wanted, Path) else wanted
    return {
        "resume": resume,
        "job": job,
        "restarts": [requeues, int(env.get("TORCHELASTIC_RESTART_COUNT") or 0)],
    }
