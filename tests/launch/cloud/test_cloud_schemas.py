"""What `onellm launch --to` renders, read by the code of those who have to understand it.

Kubernetes and JobSet: the models of the package kubeflow-trainer-api, which are generated from the
OpenAPI documents of both. SkyPilot: the schemas in its own package, which does not go into this
environment. Each misspelled key has to be found.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pip_install import install
from pydantic import ValidationError
from test_cloud_files import JOB

from onellm_dist.launch.cloud.jobset import render_jobset
from onellm_dist.launch.cloud.skypilot import render_task

kubernetes = pytest.importorskip("kubeflow_trainer_api.models", reason="it needs pydantic 2.10")
ConfigMap = kubernetes.IoK8sApiCoreV1ConfigMap
JobSet = kubernetes.JobsetV1alpha2JobSet
SKYPILOT = ("skypilot==0.11.2", "sqlalchemy[asyncio]")
"""With what it needs of SQLAlchemy and does not ask for."""
JOBS = [
    dataclasses.replace(JOB, nodes=nodes, gpus_per_node=gpus, recipe="", recipe_text="a: 1\n")
    for nodes, gpus in ((1, 8), (3, 0))
]
FREE = ("data", "limits", "requests", "accelerators", "volumes")
"""Keys whose own keys are names that a user gives."""
CHECK_TASKS = """
import json, sys
from sky.utils import common_utils, schemas
def find_fault(task):
    try:
        common_utils.validate_schema(task, schemas.get_task_schema(), "task: ")
        resources = task.get("resources", {})
        common_utils.validate_schema(resources, schemas.get_resources_schema(), "resources: ")
    except Exception as error:
        return str(error)
json.dump([find_fault(task) for task in json.load(sys.stdin)], sys.stdout)
"""


def misspell(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path of each key of a document, and the document with that key misspelled."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            for path, broken in misspell(item, f"{prefix}.{index}"):
                yield path, [*value[:index], broken, *value[index + 1 :]]
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        yield f"{prefix}.{key}", {(f"{k}s" if k == key else k): v for k, v in value.items()}
        if key not in FREE:
            for path, broken in misspell(item, f"{prefix}.{key}"):
                yield path, {**value, key: broken}


def wrap_quantities(value: Any) -> Any:
    """A document with each quantity ("8", "1.5Gi") as the models hold it."""
    if isinstance(value, list):
        return [wrap_quantities(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: {name: {"actual_instance": text} for name, text in item.items()}
        if key in ("limits", "requests")
        else wrap_quantities(item)
        for key, item in value.items()
    }


def find_fault(model: Any, document: Any) -> str:
    """What a model of Kubernetes does not accept, or does not know; "" if nothing."""
    document = wrap_quantities(document)
    try:
        known = model.model_validate(document).model_dump(by_alias=True, exclude_unset=True)
    except ValidationError as error:
        return str(error)
    return "" if known == document else f"unknown fields: {known} is not {document}"


@pytest.mark.parametrize("job", JOBS, ids=["one", "several"])
def test_manifests_are_what_kubernetes_and_jobset_read(job: Any) -> None:
    documents = list(yaml.safe_load_all(render_jobset(job)))
    for model, document in zip((ConfigMap, JobSet), documents, strict=True):
        assert find_fault(model, document) == ""
        broken = dict(misspell(document))
        assert len(broken) > 4
        assert [path for path, other in broken.items() if not find_fault(model, other)] == []
    assert len(broken) > 50
    jobset = documents[1]
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    own = pod["template"]["spec"]["containers"][0]
    limits = {**own, "resources": {"requests": {"cpu": [4]}}}
    wrong_container = {
        **pod["template"],
        "spec": {**pod["template"]["spec"], "containers": [limits]},
    }
    changes: list[dict[str, Any]] = [
        {"template": wrong_container},
        {"completions": "2"},
        {"backoffLimit": 0.5},
        {"podFailurePolicy": []},
    ]
    for change in changes:
        wrong = copy.deepcopy(jobset)
        wrong["spec"]["replicatedJobs"][0]["template"]["spec"] = {**pod, **change}
        assert find_fault(JobSet, wrong)


@pytest.mark.soak
def test_tasks_are_what_skypilot_reads(tmp_path: Path) -> None:
    """It takes two minutes: SkyPilot's package and what it needs are installed."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    install([str(tmp_path / "venv" / "bin" / "pip"), "install", "-q", *SKYPILOT])
    tasks = [yaml.safe_load(render_task(job)) for job in JOBS]
    broken = dict(misspell(tasks[0]))
    wrong = [{**tasks[0], "num_nodes": "2"}, {**tasks[0], "resources": {"gpus": 8}}]
    found = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", CHECK_TASKS],
        input=json.dumps([*tasks, *wrong, *broken.values()]),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    faults = json.loads(found.stdout)
    assert faults[: len(tasks)] == [None] * len(tasks)
    missed = [name for name, fault in zip(broken, faults[-len(broken) :], strict=True) if not fault]
    assert missed == [] and None not in faults[len(tasks) :] and len(broken) > 8
