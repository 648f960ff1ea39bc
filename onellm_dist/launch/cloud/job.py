"""What a Kubernetes manifest and a SkyPilot task are rendered from, and the checks of both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from onellm_dist.common.errors import UsageError
from onellm_dist.common.resources import recipes_dir
from onellm_dist.config.load import load_config
from onellm_dist.config.recipe_files import find_base, find_recipe, read_recipe_file
from onellm_dist.config.schema import RunConfig
from onellm_dist.launch.slurm.job import parse_nodes

CloudTarget = Literal["kubernetes", "skypilot"]
TARGETS: tuple[CloudTarget, ...] = ("kubernetes", "skypilot")
IMAGE_PYTHON = "/opt/onellm_dist/.venv/bin/python"
"""The interpreter of the image that `launch/container/Dockerfile` makes."""
LONGEST_NAME = 40
"""A pod is called NAME-node-0-INDEX, and a host name has at most 63 characters."""
LONGEST_RECIPE = 500_000
"""Characters; a ConfigMap holds 1 MiB."""
LONGEST_GRACE_PERIOD_S = 86400


@dataclass(frozen=True)
class CloudVolume:
    """A volume that every node mounts."""

    name: str
    """Name of a PersistentVolumeClaim, or of a volume of SkyPilot."""
    path: str
    """Where the volume is mounted."""


@dataclass(frozen=True)
class CloudJob:
    """A run on nodes that are containers."""

    recipe: str
    """The name of a recipe that ships; "" if `recipe_text` is the recipe."""
    recipe_text: str
    """A recipe of the user's own, which travels in the file; "" if it ships."""
    run_dir: str
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    container: str
    """The container image."""
    name: str
    volumes: tuple[CloudVolume, ...]
    overrides: tuple[str, ...] = ()
    """key=value of the recipe."""
    accelerator: str = ""
    """Kind of GPU, as SkyPilot calls it."""
    cpus_per_rank: int = 0
    """Cores of each rank; 0: what the node has."""
    grace_period_s: int = 300
    """Seconds between the request to stop and the kill; the last checkpoint must fit in."""
    max_requeues: int = 5
    """Failures in a row, without a new checkpoint between them, after which the job halts."""
    python: str = IMAGE_PYTHON
    """The interpreter with onellm_dist in the image."""
    command: str = ""
    """The `onellm launch` command that renders this job; shown at the top of the file."""


def make_cloud_job(
    recipe: Path,
    overrides: Sequence[str],
    *,
    target: CloudTarget,
    nodes: str,
    volumes: Sequence[str] = (),
    **options: Any,
) -> CloudJob:
    """Make the job of a recipe and check it.

    Args:
        recipe: a recipe file, or the name of one that ships.
        overrides: key=value of the recipe.
        target: where it is to run.
        nodes: number of nodes.
        volumes: what every node mounts, each as NAME:PATH.
        options: fields of `CloudJob`; None leaves a field at its default.

    Raises:
        UsageError: the recipe, an override or an option is wrong.
    """
    config = load_config(recipe, overrides)
    given = {key: value for key, value in options.items() if value is not None}
    name, text = _read_recipe(recipe)
    fewest, most = parse_nodes(nodes)
    if fewest != most:
        raise UsageError(
            f"--nodes {nodes}: {target} starts a fixed number of nodes",
            "a range would need a scheduler that gives what there is.",
            "give one number. A later start may have another: the run resumes on any number.",
        )
    defaults: dict[str, Any] = {
        "ranks_per_node": given["gpus_per_node"],
        "name": _make_name(find_recipe(recipe).stem),
        "container": "",
    }
    job = CloudJob(
        recipe=name,
        recipe_text=text,
        run_dir=str(config.run.dir),
        nodes=most,
        volumes=tuple(_parse_volume(item) for item in volumes),
        overrides=tuple(overrides),
        **(defaults | given),
    )
    check_cloud_job(job, target)
    _check_paths(job, config)
    return job


def check_cloud_job(job: CloudJob, target: CloudTarget) -> None:
    """Refuse a job that cannot work, as far as that is seen without its recipe.

    Raises:
        UsageError: an option is wrong; the error names it and the remedy.
    """
    if not job.container:
        raise UsageError(
            f"--to {target} needs --container",
            "the nodes run the package from an image.",
            "build launch/container/Dockerfile, push it, and give its name: "
            "--container registry.example.com/onellm_dist:0.2",
        )
    if job.ranks_per_node < 1:
        raise UsageError(
            "no ranks: --gpus-per-node is 0",
            "each rank drives one GPU.",
            "add --ranks-per-node for a run on CPUs.",
        )
    if target == "skypilot" and job.gpus_per_node and not job.accelerator:
        raise UsageError(
            "--to skypilot needs --accelerator",
            "SkyPilot looks for machines by the kind of their GPUs.",
            "add it like --accelerator A100-80GB (`sky gpus list` names them).",
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*|", job.accelerator):
        raise UsageError(
            f"--accelerator {job.accelerator!r} is not a kind of GPU",
            "SkyPilot would not find it.",
            "write it like --accelerator A100-80GB; the number is --gpus-per-node.",
        )
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", job.name) or len(job.name) > LONGEST_NAME:
        raise UsageError(
            f"--job-name {job.name!r} cannot be part of a host name",
            "the nodes find each other by names that begin with it.",
            f"use lower-case letters, digits and hyphens, at most {LONGEST_NAME}, a letter first.",
        )
    if not 1 <= job.grace_period_s <= LONGEST_GRACE_PERIOD_S:
        raise UsageError(
            f"--grace-period {job.grace_period_s} is out of range",
            f"it is 1 to {LONGEST_GRACE_PERIOD_S} seconds.",
            "use several times the seconds that a checkpoint takes.",
        )
    _check_texts(job)


def is_below(path: str, volumes: Sequence[CloudVolume]) -> bool:
    """Whether a path is on one of the volumes."""
    pure = PurePosixPath(path)
    inside = (pure.is_relative_to(PurePosixPath(volume.path)) for volume in volumes)
    return pure.is_absolute() and ".." not in pure.parts and any(inside)


def _check_paths(job: CloudJob, config: RunConfig) -> None:
    """Refuse paths that end with their container: what is written there would be lost."""
    wanted = {"run.dir": job.run_dir}
    if "://" not in str(config.data.root):
        wanted["data.root"] = str(config.data.root)
    if config.model.path is not None:
        wanted["model.path"] = str(config.model.path)
    lost = [f"{key}={path}" for key, path in wanted.items() if not is_below(path, job.volumes)]
    if lost:
        known = ", ".join(volume.path for volume in job.volumes) or "none is given"
        changes = " ".join(f"--set {item.partition('=')[0]}=/data/..." for item in lost)
        raise UsageError(
            f"{', '.join(lost)}: not on a volume ({known})",
            "all nodes must see it, and what lies in a container ends with it.",
            f"mount a shared volume, --volume NAME:/data, and set paths below it: {changes}",
        )


def _check_texts(job: CloudJob) -> None:
    """Refuse control characters, which no quoting makes safe in a comment."""
    texts = {
        "run.dir": job.run_dir,
        "--python": job.python,
        "--container": job.container,
        "the command": job.command,
        **{f"{item!r}": item for item in job.overrides},
        **{f"--volume {v.name}:{v.path}": v.path for v in job.volumes},
    }
    for name, text in texts.items():
        if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in text):
            raise UsageError(
                f"{name} has a line break or another control character",
                "it would break the file.",
                "put a key=value into a recipe file, and rename a path.",
            )


def _read_recipe(recipe: Path) -> tuple[str, str]:
    """The name of a recipe that ships and "", or "" and the text of the user's own."""
    path = find_recipe(recipe)
    shipped = recipes_dir().resolve()
    if path.resolve().is_relative_to(shipped):
        return str(path.resolve().relative_to(shipped).with_suffix("")), ""
    file = read_recipe_file(path)
    base = None if file.base is None else find_base(file)
    if base is not None and not base.resolve().is_relative_to(shipped):
        raise UsageError(
            f"{path} is built on {base}",
            "the nodes get this one file, and the image has the included recipes.",
            "write both into one file, or build it on a recipe that ships.",
        )
    if len(file.text) > LONGEST_RECIPE:
        raise UsageError(
            f"{path} has {len(file.text):,} characters",
            f"a recipe that travels in the file has at most {LONGEST_RECIPE:,}.",
            "name folders of datasets instead of each dataset.",
        )
    return "", file.text


def _make_name(stem: str) -> str:
    """A name for hosts, from that of a recipe: `stage1_image` is stage1-image."""
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return name if re.match(r"[a-z]", name) else f"onellm-{name}"[:LONGEST_NAME].strip("-")


def _parse_volume(item: str) -> CloudVolume:
    name, _, path = item.partition(":")
    pure = PurePosixPath(path)
    if (
        not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name)
        or not pure.is_absolute()
        or ".." in pure.parts
        or ":" in path
        or str(pure) == "/"
    ):
        raise UsageError(
            f"--volume {item} is not NAME:/PATH",
            "it names a PersistentVolumeClaim (or a volume of SkyPilot), and where it is mounted.",
            "write it like --volume shared:/data.",
        )
    return CloudVolume(name, str(pure))
