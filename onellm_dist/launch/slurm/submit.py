"""From a recipe to a submitted job: make the job, check its script, hand it to Slurm."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onellm_dist.common import run_files
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.config.load import load_config
from onellm_dist.config.recipe_files import find_recipe
from onellm_dist.launch.slurm.job import SlurmJob, check_job, parse_nodes
from onellm_dist.launch.slurm.programs import EVALUATION, KEPT_CHECKPOINTS
from onellm_dist.launch.slurm.sweep import make_sweep

COMMAND_S = 60
DEFAULT_GPUS = 8


def make_job(
    recipe: Path,
    overrides: Sequence[str],
    *,
    nodes: str,
    array: Sequence[str] = (),
    **options: Any,
) -> SlurmJob:
    """Make the job of a recipe and check it.

    Args:
        recipe: a recipe file, or the name of one that ships.
        overrides: key=value of the recipe.
        nodes: number of nodes, as `parse_nodes` takes it.
        array: keys with the values of the runs of a sweep, as `parse_sweep` takes them.
        options: fields of `SlurmJob`; None leaves a field at its default.

    Raises:
        UsageError: the recipe, an override or an option is wrong.
    """
    config = load_config(recipe, overrides)
    section, folders = config.data.validation, [config.run.dir, config.data.root]
    if section is not None and section.tasks_data is not None:
        folders.append(section.tasks_data)
    return _build_job(
        options,
        folders=folders,
        evaluates=section is not None and bool(section.tasks),
        recipe=str(recipe),
        overrides=tuple(overrides),
        run_dir=config.run.dir,
        sweep=tuple(make_sweep(recipe, overrides, array)),
        nodes=parse_nodes(nodes),
        name=_make_name(find_recipe(recipe).stem),
    )


def make_evaluation_job(
    model: Path,
    arguments: Sequence[str],
    *,
    tasks: Sequence[str],
    data: Path,
    out: Path,
    nodes: str,
    **options: Any,
) -> SlurmJob:
    """Make the job of an evaluation and check it.

    Args:
        model: the model's folder.
        arguments: what `onellm evaluate` is given behind the model.
        tasks: the tasks among them.
        data: the folder of datasets among them.
        out: the folder of answers among them.
        nodes: number of nodes, as `parse_nodes` takes it.
        options: fields of `SlurmJob`; None leaves a field at its default.

    Raises:
        UsageError: an option is wrong.
    """
    return _build_job(
        options,
        folders=[model, data, out],
        recipe=str(model),
        overrides=tuple(arguments),
        program=EVALUATION,
        end_arguments=("--tasks", *tasks),
        run_dir=out,
        nodes=parse_nodes(nodes),
        name=_make_name(f"evaluate-{out.name}"),
    )


def make_kept_job(job: SlurmJob, run_dir: Path) -> SlurmJob:
    """The job in which the kept checkpoints of a run answer `data.validation.tasks`.

    It takes one node like those of the run, on which one process starts the ranks.

    Args:
        job: the job of the run.
        run_dir: the run directory.
    """
    return replace(
        job,
        program=KEPT_CHECKPOINTS,
        recipe=str(run_dir),
        overrides=("--ranks", str(job.ranks_per_node)),
        run_dir=run_dir / run_files.EVALUATION,
        nodes=(1, 1),
        ranks_per_node=1,
        cpus_per_rank=job.cpus_per_rank * job.ranks_per_node,
        starter="srun",
        sweep=(),
        evaluates=False,
        preflight=False,
        name=_make_name(f"evaluate-{run_dir.name}"),
    )


def _build_job(options: Mapping[str, Any], folders: Sequence[Path | str], **own: Any) -> SlurmJob:
    """Make a job of options (None: the default) and of fields, which an option may replace."""
    given = {key: value for key, value in options.items() if value is not None}
    gpus = int(given.pop("gpus_per_node", DEFAULT_GPUS))
    seen = [*given.pop("mounts", ()), *folders]
    mounts = dict.fromkeys(
        str(path) for path in seen if isinstance(path, str) or path.is_absolute()
    )
    defaults: dict[str, Any] = {
        "ranks_per_node": gpus,
        "python": "python" if given.get("container") else find_python(),
        "mounts": tuple(mounts) if given.get("container") else (),
    }
    job = SlurmJob(gpus_per_node=gpus, **(defaults | own | given))
    check_job(job)
    return job


def _make_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)


def find_python() -> str:
    """The name by which a job finds this Python: `python` if PATH leads to it, else its path."""
    found = shutil.which("python")
    if found and Path(found).absolute() == Path(sys.executable).absolute():
        return "python"
    return sys.executable


def check_script(text: str) -> str:
    """Check a job script by `bash -n`, and by `sbatch --test-only` if a Slurm answers here.

    Returns:
        What was checked, and when Slurm expects the job to start.

    Raises:
        OneLLMError: one of them refuses the script.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        syntax = _run(["bash", "-n", file.name])
        if syntax.returncode:
            raise OneLLMError(
                f"the job script is not valid bash: {syntax.stderr.strip()}",
                "it would fail at its start.",
                "this is a bug of onellm launch: report it with the command.",
            )
        if shutil.which("sbatch") is None:
            return "bash -n passes; there is no sbatch here, so Slurm was not asked"
        tried = _run(["sbatch", "--test-only", file.name])
    answer = tried.stderr.strip() or tried.stdout.strip()
    if tried.returncode == 0:
        return f"bash -n and sbatch --test-only pass ({answer.removeprefix('sbatch: ')})"
    if not _has_slurm():
        return "bash -n passes; sbatch is here, but no Slurm answers it"
    raise OneLLMError(
        f"Slurm refuses the job script: {answer}",
        "it would not be queued.",
        "change --partition, --account, --time, --nodes or the GPUs accordingly.",
    )


def submit_script(path: Path, options: Sequence[str] = ()) -> str:
    """Submit a job script by `sbatch`.

    Args:
        path: the script.
        options: further options of sbatch.

    Returns:
        The id of the job.

    Raises:
        UsageError: there is no sbatch here.
        OneLLMError: sbatch refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise UsageError(
            "--submit: there is no sbatch here",
            "jobs are submitted from a machine of the cluster.",
            f"copy {path} there and run: sbatch {shlex.quote(str(path))}",
        )
    done = _run(["sbatch", "--parsable", *options, str(path)])
    if done.returncode:
        raise OneLLMError(
            f"sbatch refuses {path}: {done.stderr.strip()}",
            "the job is not queued.",
            "fix what it names, and run sbatch again.",
        )
    return done.stdout.strip().split(";")[0]


def _has_slurm() -> bool:
    """Whether a Slurm controller answers from here."""
    try:
        return "is UP" in _run(["scontrol", "ping"]).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
