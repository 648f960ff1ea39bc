"""A run as a managed job of SkyPilot (docs.skypilot.co, fields of 0.11.2).

SkyPilot starts a job again whose nodes were taken, and one that ended with an exit code of
`recover_on_exit_codes`, which 0.11.1 refuses; the script of a node ends with that one if there is
to be another start.
"""

from __future__ import annotations

from typing import Any

from onellm_dist import __version__
from onellm_dist.common.counts import format_count
from onellm_dist.launch.cloud.job import CloudJob
from onellm_dist.launch.cloud.node_script import PORT, START_AGAIN, render_node_script
from onellm_dist.launch.cloud.yaml_file import format_yaml

PLACE = f"""\
# SkyPilot says which node this is, and where the first one is.
node=$SKYPILOT_NODE_RANK
export ONELLM_JOB_ID="$SKYPILOT_TASK_ID" ONELLM_JOB_NODES="$SKYPILOT_NODE_IPS"
export ONELLM_JOB_ADDRESS="${{SKYPILOT_NODE_IPS%%$'\\n'*}}" ONELLM_JOB_PORT={PORT}
"""
END_OF_RECIPE = "END_OF_RECIPE"


def render_task(job: CloudJob) -> str:
    """Render a task for `sky jobs launch`."""
    resources: dict[str, Any] = {}
    if job.gpus_per_node:
        resources["accelerators"] = {job.accelerator: job.gpus_per_node}
    if job.cpus_per_rank:
        resources["cpus"] = f"{job.cpus_per_rank * job.ranks_per_node}+"
    resources["image_id"] = f"docker:{job.container}"
    # Not 137 beside it: SkyPilot kills the other nodes of a job that has ended, and they end so.
    resources["job_recovery"] = {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [START_AGAIN],
    }
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": resources,
        "volumes": {volume.path: volume.name for volume in job.volumes},
        "run": render_node_script(job, place=PLACE, recipe=_format_recipe(job)),
    }
    nodes = format_count(job.nodes, "node")
    comments = [
        f"Recipe {job.recipe or 'below'} on {nodes} with "
        f"{format_count(job.ranks_per_node, 'rank')} each.",
        f"Rendered by onellm_dist {__version__}. It is yours: read it, edit it, keep it.",
        "sky jobs launch FILE (SkyPilot 0.11.2 or newer)",
        *filter(None, [job.command]),
    ]
    return format_yaml([task], comments)


def _format_recipe(job: CloudJob) -> str:
    """Lines that write the recipe to a file; "" if it ships."""
    if not job.recipe_text:
        return ""
    end = END_OF_RECIPE
    while end in job.recipe_text:
        end += "_"
    text = job.recipe_text if job.recipe_text.endswith("\n") else f"{job.recipe_text}\n"
    return f"recipe=$(mktemp -d)/recipe.yaml\ncat >\"$recipe\" <<'{end}'\n{text}{end}\n"
