"""A run as a JobSet, the Kubernetes API for jobs of several nodes (jobset.sigs.k8s.io).

Fields: JobSet v1alpha2 of release 0.10 (`onJobFailureMessagePatterns` is new there), Job batch/v1.
"""

from __future__ import annotations

from typing import Any

from onellm_dist import __version__
from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_FAILED, EXIT_USAGE
from onellm_dist.launch.cloud.job import CloudJob
from onellm_dist.launch.cloud.node_script import PORT, START_AGAIN, render_node_script
from onellm_dist.launch.cloud.yaml_file import format_yaml

FOLDER = "/etc/onellm"
"""Where the script and the recipe are mounted."""
CONTAINER = "ranks"
NODE = "node"
UID_LABEL = "jobset.sigs.k8s.io/jobset-uid"


def render_jobset(job: CloudJob) -> str:
    """Render a manifest: a ConfigMap with the script of a node, and the JobSet."""
    files = {"node.sh": render_node_script(job, place=_format_place(job), recipe=_name_recipe(job))}
    if job.recipe_text:
        files["recipe.yaml"] = job.recipe_text
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-files"},
        "data": files,
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": _make_failure_policy(job),
            "replicatedJobs": [
                {"name": NODE, "replicas": 1, "template": {"spec": _make_job_spec(job)}}
            ],
        },
    }
    return format_yaml([config_map, jobset], _make_comments(job))


def _make_comments(job: CloudJob) -> list[str]:
    nodes = format_count(job.nodes, "node")
    lines = [
        f"Recipe {job.recipe or 'below'} on {nodes} with "
        f"{format_count(job.ranks_per_node, 'rank')} each.",
        f"Rendered by onellm_dist {__version__}. It is yours: read it, edit it, keep it.",
        "kubectl apply -f FILE (JobSet 0.10 or newer must be installed)",
    ]
    return [*lines, *filter(None, [job.command])]


def _format_place(job: CloudJob) -> str:
    names = " ".join(f"{job.name}-{NODE}-0-{index}" for index in range(job.nodes))
    return (
        "# Kubernetes says which node this is; ONELLM_JOB_ID comes from the manifest.\n"
        "node=$JOB_COMPLETION_INDEX\n"
        f'export ONELLM_JOB_NODES="{names}"\n'
        f"export ONELLM_JOB_ADDRESS={job.name}-{NODE}-0-0.{job.name} ONELLM_JOB_PORT={PORT}\n"
    )


def _name_recipe(job: CloudJob) -> str:
    return f"recipe={FOLDER}/recipe.yaml\n" if job.recipe_text else ""


def _make_failure_policy(job: CloudJob) -> dict[str, Any]:
    """The requeue logic: the first rule that matches a Job's failure counts.

    The texts that the patterns look for are those of Kubernetes' Job controller: "Container ranks
    for pod NAMESPACE/NAME failed with exit code 75 matching FailJob rule at index 0", and "Pod
    NAMESPACE/NAME has condition DisruptionTarget matching FailJob rule at index 1". A failure
    without a rule (a container that was killed for its memory) restarts the JobSet, up to
    `maxRestarts` times.
    """
    decided = ["PodFailurePolicy"]
    return {
        "maxRestarts": job.max_requeues,
        "rules": [
            {
                "name": "asksToStartAgain",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": decided,
                "onJobFailureMessagePatterns": [f".*exit code {START_AGAIN} .*"],
            },
            {
                "name": "nodeWasTaken",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": decided,
                "onJobFailureMessagePatterns": [".*condition DisruptionTarget .*"],
            },
            {"name": "halted", "action": "FailJobSet", "onJobFailureReasons": decided},
        ],
    }


def _make_job_spec(job: CloudJob) -> dict[str, Any]:
    """The Job: one pod for each node. The first pod that fails makes it fail."""

    def on_exit_codes(*codes: int) -> dict[str, Any]:
        wanted = {"containerName": CONTAINER, "operator": "In", "values": list(codes)}
        return {"action": "FailJob", "onExitCodes": wanted}

    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                on_exit_codes(START_AGAIN),
                {"action": "FailJob", "onPodConditions": disrupted},
                on_exit_codes(EXIT_FAILED, EXIT_USAGE),
            ]
        },
        "template": {"spec": _make_pod_spec(job)},
    }


def _make_pod_spec(job: CloudJob) -> dict[str, Any]:
    own = {"fieldRef": {"fieldPath": f"metadata.labels['{UID_LABEL}']"}}
    resources: dict[str, Any] = {}
    if job.cpus_per_rank:
        resources["requests"] = {"cpu": str(job.cpus_per_rank * job.ranks_per_node)}
    if job.gpus_per_node:
        resources["limits"] = {"nvidia.com/gpu": str(job.gpus_per_node)}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_period_s,
        "containers": [
            {
                "name": CONTAINER,
                "image": job.container,
                "command": ["bash", f"{FOLDER}/node.sh"],
                "env": [{"name": "ONELLM_JOB_ID", "valueFrom": own}],
                "resources": resources,
                "volumeMounts": [
                    {"name": "files", "mountPath": FOLDER},
                    {"name": "shm", "mountPath": "/dev/shm"},
                    *(
                        {"name": f"volume-{index}", "mountPath": volume.path}
                        for index, volume in enumerate(job.volumes)
                    ),
                ],
            }
        ],
        "volumes": [
            {"name": "files", "configMap": {"name": f"{job.name}-files"}},
            # NCCL connects the GPUs of a node through it; a container has 64 MiB by default.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *(
                {"name": f"volume-{index}", "persistentVolumeClaim": {"claimName": volume.name}}
                for index, volume in enumerate(job.volumes)
            ),
        ],
    }
