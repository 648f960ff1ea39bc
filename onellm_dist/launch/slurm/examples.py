"""The job scripts in `launch/slurm/`: the paper's four runs, and one for any recipe.

`python -m onellm_dist.launch.slurm.examples` renders them again.
"""

from __future__ import annotations

from pathlib import Path

from onellm_dist.common.output import write_output
from onellm_dist.common.resources import recipes_dir
from onellm_dist.config.load import load_config
from onellm_dist.config.recipe_files import find_recipe
from onellm_dist.launch.slurm.job import SlurmJob, check_job
from onellm_dist.launch.slurm.script import render

PAPER_NODES = {"stage1_image": 2, "stage2_video_audio_point": 1, "stage3_all": 1, "tune": 1}
"""Nodes of 8 A100s (paper, section 4.1: 16 GPUs in stage I, 8 in the others)."""
GPUS_PER_NODE = 8
GENERIC = "generic"


def render_examples() -> dict[str, str]:
    """Render every shipped job script: file name to text."""
    jobs = [_make_paper_job(name, nodes) for name, nodes in PAPER_NODES.items()]
    jobs.append(
        SlurmJob(
            recipe="",
            run_dir=Path(),
            nodes=(1, 1),
            gpus_per_node=GPUS_PER_NODE,
            ranks_per_node=GPUS_PER_NODE,
            name=GENERIC,
        )
    )
    for job in jobs:
        check_job(job)
    return {f"{job.name}.sbatch": render(job) for job in jobs}


def _make_paper_job(name: str, nodes: int) -> SlurmJob:
    return SlurmJob(
        recipe=name,
        run_dir=load_config(find_recipe(Path(name))).run.dir,
        nodes=(nodes, nodes),
        gpus_per_node=GPUS_PER_NODE,
        ranks_per_node=GPUS_PER_NODE,
        name=name,
        command=(
            f"onellm launch {name} --nodes {nodes} --gpus-per-node {GPUS_PER_NODE} "
            f"--out launch/slurm/{name}.sbatch"
        ),
    )


def main() -> None:
    """Write the job scripts into `launch/slurm/`."""
    folder = recipes_dir().parent / "slurm"
    folder.mkdir(exist_ok=True)
    for name, text in render_examples().items():
        (folder / name).write_text(text, encoding="utf-8")
        write_output(f"written: {folder / name}")


if __name__ == "__main__":
    main()
