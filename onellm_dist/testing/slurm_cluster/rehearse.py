"""`onellm rehearse`: the job script of a recipe, at toy size, through what a cluster does to it, under a real Slurm on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, UsageError
from onellm_dist.config.load import find_recipe, load_config
from onellm_dist.launch.slurm.script import render
from onellm_dist.launch.slurm.submit import make_job
from onellm_dist.testing.slurm_cluster.cluster import Cluster
from onellm_dist.testing.slurm_cluster.history import Comparison, compare
from onellm_dist.testing.slurm_cluster.requirements import check_needs
from onellm_dist.testing.slurm_cluster.scenarios import SCENARIOS, Interrupted, Stage

TOY_RECIPE = Path("toy/align_image")
STEPS, EVERY, SAMPLES = 12, 4, 64
"""Steps of the run, steps between two checkpoints, samples of each toy dataset that is made."""
GRACE_S = 60
"""Notice of a preemption: generous, for the machine may be busy."""
PATIENCE_S = 900.0


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    scenario: str
    came: Interrupted
    against: Comparison
    seconds: float

    @property
    def passed(self) -> bool:
        """Same samples, same losses."""
        return self.against.stream and self.against.losses


def rehearse_command(
    recipe: Path,
    overrides: Sequence[str],
    *,
    nodes: int,
    ranks_per_node: int,
    starter: str,
    out: Path,
    only: Sequence[str] = (),
    preflight: bool = False,
) -> int:
    """Rehearse a recipe and print the table.

    Args:
        out: run directories, logs and the job scripts go here; what an earlier rehearsal left there is replaced.
        only: names of SCENARIOS; all where empty. The clean run is always among them.

    Returns:
        0; 1 where a scenario did not come through, or not with the samples and losses of the undisturbed run.

    Raises:
        UsageError: the recipe or an option is wrong.
        OneLLMError: no Slurm can run here, or the data could not be made.
    """
    chosen = _chosen(only)
    keys = toy_size(recipe, overrides, ranks=nodes * ranks_per_node, data=out / "toy")
    check_needs(ssh=starter == "deepspeed")
    _clear(out)
    toy_data(recipe, keys, out / "toy")
    rows: list[Row] = []
    failed: list[str] = []
    with Cluster(nodes, grace_s=GRACE_S, ssh=starter == "deepspeed") as cluster:
        cluster.env |= {
            "OMP_NUM_THREADS": str(
                max(1, len(os.sched_getaffinity(0)) // (nodes * ranks_per_node))
            ),
            "DS_ACCELERATOR": "cpu",
        }
        (out / ".deepspeed_env").write_text(deepspeed_env(cluster), encoding="utf-8")
        for name in chosen:
            print(f"rehearsal: {name} ...", flush=True)
            started = time.monotonic()
            try:
                stage = _stage(
                    cluster,
                    recipe,
                    keys,
                    name,
                    starter=starter,
                    ranks=ranks_per_node,
                    preflight=preflight,
                    out=out,
                )
                came = SCENARIOS[name](stage)
            except OneLLMError as error:
                print(f"rehearsal: {name}: {error}", file=sys.stderr, flush=True)
                failed.append(name)
                if name == chosen[0]:  # nothing to compare the others with
                    break
                _start_again(cluster)
                continue
            rows.append(
                Row(
                    name,
                    came,
                    compare(stage.run_dir, out / _slug(chosen[0])),
                    time.monotonic() - started,
                )
            )
            _clear_weights(stage.run_dir)
    print(table(rows, failed))
    return EXIT_DONE if not failed and all(row.passed for row in rows) else EXIT_FAILED


def toy_size(recipe: Path, overrides: Sequence[str], *, ranks: int, data: Path) -> list[str]:
    """key=value that bring a recipe down to what two CPU cores do in seconds a step: the toy model, toy data, few samples and steps.

    Stage, schedule and loop stay the recipe's own, and `overrides` have the last word.
    """
    toy = load_config(TOY_RECIPE)
    mixture = ", ".join(
        f"{{path: {entry.path}, weight: {entry.weight}}}" for entry in toy.data.mixture
    )
    keys = {
        "model.preset": "toy",
        "data.root": data.resolve(),
        "data.mixture": f"[{mixture}]",
        "data.global_batch": 2 * ranks,
        "model.init_from_image": "[]",
        "data.workers": 1,
        "data.pack_llm_tokens": toy.data.pack_llm_tokens,
        "data.pack_encoder_tokens": toy.data.pack_encoder_tokens,
        "data.validation": "",
        "train.steps": STEPS,
        "train.precision": "fp32",
        "train.log_every": 1,
        "checkpoint.every": EVERY,
        "checkpoint.keep": 2,
        "engine.config": toy.engine.config,
    }
    found = [f"{key}={value}" for key, value in keys.items()]
    load_config(recipe, [*found, *overrides])
    return [*found, *overrides]


def toy_data(recipe: Path, keys: Sequence[str], folder: Path) -> None:
    """Make the toy datasets of the mixture, where they are not there (data given by an override is the user's)."""
    config = load_config(recipe, keys)
    if config.data.root != folder.resolve() or folder.is_dir():
        return
    names = ",".join(str(entry.path) for entry in config.data.mixture)
    aside = folder.with_name(
        f"{folder.name}.partial"
    )  # a build that was stopped must not be taken for whole
    shutil.rmtree(aside, ignore_errors=True)
    command = [sys.executable, "-m", "onellm_dist.cli", "shards", "build", "toyworld", str(aside)]
    command += ["-o", f"train={SAMPLES}", "-o", "test=1", "-o", f"modalities={names}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OneLLMError(
            f"the toy data could not be made: {done.stderr.strip()}",
            "the rehearsal has nothing to read.",
            "mend what it names.",
        )
    aside.rename(folder)


def deepspeed_env(cluster: Cluster) -> str:
    """`.deepspeed_env`: what ranks that ssh starts need of the environment and do not get by themselves."""
    return "".join(
        f"{key}={cluster.env[key]}\n"
        for key in ("PATH", "TMPDIR", "OMP_NUM_THREADS", "DS_ACCELERATOR")
    )


def _stage(
    cluster: Cluster,
    recipe: Path,
    keys: Sequence[str],
    scenario: str,
    *,
    starter: str,
    ranks: int,
    preflight: bool,
    out: Path,
) -> Stage:
    run_dir = (out / _slug(scenario)).resolve()
    nodes = len(cluster.nodes)
    path = find_recipe(recipe).resolve()
    job = make_job(
        path,
        [*keys, f"run.dir={run_dir}"],
        nodes=f"1-{nodes}" if nodes > 1 else "1",
        gpus_per_node=ranks,
        preflight=preflight,
        ranks_per_node=ranks,
        starter=starter,
        name=_slug(scenario),
        time="1:00:00",
    )
    script = out / f"{_slug(scenario)}.sbatch"
    script.write_text(render(job), encoding="utf-8")
    return Stage(
        cluster,
        script.resolve(),
        job.name,
        out.resolve(),
        run_dir,
        load_config(path, keys).checkpoint.every,
        PATIENCE_S,
    )


def table(rows: Sequence[Row], failed: Sequence[str]) -> str:
    """The table as text."""
    heads = (
        "scenario",
        "first start ended",
        "steps",
        "redone",
        "restarts",
        "nodes",
        "requeue to step",
        "samples",
        "losses",
        "seconds",
    )
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        back = "-" if row.came.back_s is None else f"{row.came.back_s:.1f} s"
        same = (
            "the same" if row.against.stream else "DIFFER",
            f"within {row.against.largest_gap:.0e}" if row.against.losses else "DIFFER",
        )
        if row is rows[0]:
            same = ("reference", "reference")
        lines.append(
            (
                row.scenario,
                row.came.ended,
                str(row.against.steps),
                str(row.came.redone),
                str(len(row.came.nodes) - 1),
                " -> ".join(map(str, row.came.nodes)),
                back,
                *same,
                f"{row.seconds:.0f}",
            )
        )
    lines += [(name, "FAILED", *["-"] * (len(heads) - 2)) for name in failed]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _chosen(only: Sequence[str]) -> list[str]:
    names = list(SCENARIOS)
    wrong = [name for name in only if name not in SCENARIOS]
    if wrong:
        raise UsageError(
            f"no scenario {wrong[0]!r}", "there are five.", f"use of: {', '.join(names)}."
        )
    return [name for name in names if not only or name in only or name == names[0]]


def _start_again(cluster: Cluster) -> None:
    """After a scenario that failed: nothing of it is left in the queue, every node is up."""
    cluster.run("scancel", "--user=root", check=False)
    for name in cluster.nodes:
        if not cluster.is_up(name):
            cluster.start_node(name)
    cluster.wait_for_nodes(cluster.nodes)


def _clear(out: Path) -> None:
    """What an earlier rehearsal left, but its data."""
    out.mkdir(parents=True, exist_ok=True)
    for name in SCENARIOS:
        shutil.rmtree(out / _slug(name), ignore_errors=True)
        for path in out.glob(f"{_slug(name)}*.*"):
            path.unlink()


def _clear_weights(run_dir: Path) -> None:
    """The run went through: its figures stay, its checkpoints and model are not needed."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")
