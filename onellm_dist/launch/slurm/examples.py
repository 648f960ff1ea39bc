"""The job scripts in `launch/slurm/`: the paper's runs and one for any recipe. `python -m onellm_dist.launch.slurm.examples` writes them anew."""

from __future__ import annotations

from pathlib import Path

from onellm_dist.common.resources import recipes_dir
from onellm_dist.config.load import find_recipe, load_config
from onellm_dist.launch.slurm.job import Job, check_job
from onellm_dist.launch.slurm.script import render

PAPER = {"stage1_image": 2, "stage2_video_audio_point": 1, "stage3_all": 1, "tune": 1}
"""Nodes of 8 A100 (paper, section 4.1: 16 GPUs in stage I, 8 in the others)."""
GENERIC = "generic"


def example_scripts() -> dict[str, str]:
    """File name -> text."""
    jobs = [_paper_job(name, nodes) for name, nodes in PAPER.items()]
    jobs.append(
        Job(
            recipe="", run_dir=Path(), nodes=(1, 1), gpus_per_node=8, ranks_per_node=8, name=GENERIC
        )
    )
    for job in jobs:
        check_job(job)
    return {f"{job.name}.sbatch": render(job) for job in jobs}


def _paper_job(name: str, nodes: int) -> Job:
    run_dir = load_config(find_recipe(Path(name))).run.dir
    command = (
        f"onellm launch {name} --nodes {nodes} --gpus-per-node 8 --out launch/slurm/{name}.sbatch"
    )
    return Job(
        recipe=name,
        run_dir=run_dir,
        nodes=(nodes, nodes),
        gpus_per_node=8,
        ranks_per_node=8,
        name=name,
        command=command,
    )


def main() -> None:
    """Write the files."""
    folder = recipes_dir().parent / "slurm"
    folder.mkdir(exist_ok=True)
    for name, text in example_scripts().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(f"written: {folder / name}")


if __name__ == "__main__":
    main()
