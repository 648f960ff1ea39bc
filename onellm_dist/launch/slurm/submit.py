"""`onellm launch`: a recipe becomes a job script; it is checked, written and, on request, submitted."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import EXIT_DONE, OneLLMError, UsageError
from onellm_dist.config.load import find_recipe, load_config
from onellm_dist.launch.slurm.job import Job, check_job, parse_nodes
from onellm_dist.launch.slurm.script import render

SCRIPT = "job.sbatch"
COMMAND_S = 60


def launch_command(
    recipe: Path,
    overrides: Sequence[str],
    *,
    nodes: str,
    out: Path | None,
    submit: bool,
    command: str = "",
    **options: Any,
) -> int:
    """Render, check and write the job script (to stdout without `out` and `submit`); submit it where asked.

    Args:
        options: fields of `Job` by name; None leaves its default.

    Returns:
        0.

    Raises:
        UsageError: an option, the recipe or an override is wrong; nothing was written.
        OneLLMError: Slurm refuses the script, or it cannot be submitted from here.
    """
    job = make_job(recipe, overrides, nodes=nodes, command=command, **options)
    text = render(job)
    print(f"onellm launch: {check_script(text)}", file=sys.stderr)
    if out is None and not submit:
        print(text, end="")
        return EXIT_DONE
    path = out or job.run_dir / SCRIPT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if not submit:
        print(f"written: {path}\nsubmit it: sbatch {path}")
        return EXIT_DONE
    print(
        f"written: {path}\nsubmitted: job {submit_script(path)}; history in {job.run_dir}/attempts.jsonl"
    )
    return EXIT_DONE


def make_job(recipe: Path, overrides: Sequence[str], *, nodes: str, **options: Any) -> Job:
    """The job of a recipe, checked.

    Raises:
        UsageError: the recipe, an override or an option is wrong.
    """
    config = load_config(recipe, overrides)
    given = {key: value for key, value in options.items() if value is not None}
    gpus = int(given.pop("gpus_per_node", 8))
    python = "python" if given.get("container") else own_python()
    wanted = [*given.pop("mounts", ()), config.run.dir, config.data.root]
    mounts = tuple(
        dict.fromkeys(str(path) for path in wanted if isinstance(path, str) or path.is_absolute())
    )
    job = Job(
        recipe=str(recipe),
        overrides=tuple(overrides),
        run_dir=config.run.dir,
        nodes=parse_nodes(nodes),
        gpus_per_node=gpus,
        **{"ranks_per_node": gpus, "name": find_recipe(recipe).stem, "python": python, **given},
        mounts=mounts if given.get("container") else (),
    )
    check_job(job)
    return job


def own_python() -> str:
    """`python` where that is the one that runs this, else its full path: the job must find the package."""
    found = shutil.which("python")
    return (
        "python"
        if found and Path(found).absolute() == Path(sys.executable).absolute()
        else sys.executable
    )


def check_script(text: str) -> str:
    """`bash -n`, and `sbatch --test-only` where there is a Slurm that answers.

    Returns:
        What was checked, and what Slurm says of the start.

    Raises:
        OneLLMError: one of them refuses it.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        syntax = subprocess.run(
            ["bash", "-n", file.name],
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if syntax.returncode:
            raise OneLLMError(
                f"the job script is no valid bash: {syntax.stderr.strip()}",
                "it would fail at its start.",
                "this is a fault of onellm launch: report it with the command.",
            )
        if shutil.which("sbatch") is None:
            return "bash -n passes; no sbatch here, so Slurm was not asked"
        tried = subprocess.run(
            ["sbatch", "--test-only", file.name],
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
    said = tried.stderr.strip() or tried.stdout.strip()
    if tried.returncode == 0:
        return f"bash -n and sbatch --test-only pass ({said.removeprefix('sbatch: ')})"
    if not _slurm_answers():
        return "bash -n passes; sbatch is here, but no Slurm answers it"
    raise OneLLMError(
        f"Slurm refuses the job script: {said}",
        "it would not be queued.",
        "change --partition, --account, --time, --nodes or the GPUs accordingly.",
    )


def submit_script(path: Path, options: Sequence[str] = ()) -> str:
    """`sbatch`; returns the job's number.

    Raises:
        OneLLMError: there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UsageError(
            "--submit: no sbatch here",
            "jobs are submitted from a machine of the cluster.",
            f"copy {path} there and run: sbatch {path}",
        )
    done = subprocess.run(
        ["sbatch", "--parsable", *options, str(path)],
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    if done.returncode:
        raise OneLLMError(
            f"sbatch refuses {path}: {done.stderr.strip()}",
            "the job is not queued.",
            "change what it names, and run sbatch again.",
        )
    return done.stdout.strip().split(";")[0]


def _slurm_answers() -> bool:
    try:
        return (
            "is UP"
            in subprocess.run(
                ["scontrol", "ping"], capture_output=True, text=True, timeout=COMMAND_S, check=False
            ).stdout
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
