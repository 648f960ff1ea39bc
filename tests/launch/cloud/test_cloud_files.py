"""`onellm launch --to kubernetes | skypilot`: what is rendered, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from onellm_dist.cli import app
from onellm_dist.common.errors import EXIT_CODES, UsageError
from onellm_dist.launch.cloud.job import (
    TARGETS,
    CloudJob,
    CloudTarget,
    CloudVolume,
    check_cloud_job,
    make_cloud_job,
)
from onellm_dist.launch.cloud.jobset import CONTAINER, render_jobset
from onellm_dist.launch.cloud.node_script import NO_DECISION, START_AGAIN
from onellm_dist.launch.cloud.skypilot import render_task
from onellm_dist.launch.cloud.yaml_file import format_yaml

SCHEMAS = Path(__file__).parents[2] / "fixtures" / "launch_schemas"
JOB = CloudJob(
    recipe="tune",
    recipe_text="",
    run_dir="/data/runs/x",
    nodes=2,
    gpus_per_node=8,
    ranks_per_node=8,
    container="registry.example.com/onellm_dist:0.2",
    name="tune",
    volumes=(CloudVolume("shared", "/data"),),
    accelerator="H100",
    cpus_per_rank=6,
)
RENDER = {"kubernetes": render_jobset, "skypilot": render_task}
NASTY = "a Z9'\"$`;&|<>(){}[]*?!#~\\=%,@+-_.^é漢😀\u2028"
texts = st.text(st.sampled_from(NASTY), min_size=1, max_size=12)
names = texts.map(lambda text: text.strip(".") or "a")
NUMBERS = ("1e-5", "y", "No", "null", "~", "0x1F", "1_000", "12:30", ".inf", "2026-11-29", "", "=")
RECORD = """#!/bin/bash
printf '%s\\0' "$@" >"$(mktemp "$RECORDS/python.XXXXXX")"
case " $* " in
*" end "*) echo done 0 0 ;;
*" onellm_dist.train "*)
    while [ "$1" != onellm_dist.train ]; do shift; done
    [ ! -e "$2" ] || cat <"$2" >"$RECIPE" ;;
esac
"""


def read_schema(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return schema


def get_script(target: str, documents: list[Any]) -> str:
    if target == "skypilot":
        return str(documents[0]["run"])
    return str(documents[0]["data"]["node.sh"])


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("gpus", [0, 8])
def test_a_manifest_is_what_the_schema_of_jobset_allows(nodes: int, gpus: int) -> None:
    job = dataclasses.replace(JOB, nodes=nodes, gpus_per_node=gpus, recipe="", recipe_text="a: 1\n")
    files, jobset = yaml.safe_load_all(render_jobset(job))
    validator = Draft202012Validator(read_schema("jobset"))
    validator.validate(jobset)
    assert files["kind"] == "ConfigMap" and set(files["data"]) == {"node.sh", "recipe.yaml"}
    assert files["data"]["recipe.yaml"] == "a: 1\n"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (spec["completions"], spec["parallelism"]) == (nodes, nodes)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"].get("limits", {}) == ({"nvidia.com/gpu": "8"} if gpus else {})
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    # The ranks meet at the first pod's host name.
    host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
    assert f"ONELLM_JOB_ADDRESS={host} " in files["data"]["node.sh"]

    def break_schema(change: Any) -> bool:
        broken = copy.deepcopy(jobset)
        change(broken)
        return not validator.is_valid(broken)

    def job_of(manifest: Any) -> Any:
        return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]

    assert break_schema(lambda m: m["spec"].update(maxRestarts=3))
    assert break_schema(lambda m: job_of(m).update(completions="2"))
    assert break_schema(lambda m: job_of(m)["template"]["spec"].update(restartPolicy="OnFailure"))
    assert break_schema(lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Restart"))


@pytest.mark.parametrize("gpus", [0, 8])
def test_a_task_is_what_the_schema_of_skypilot_allows(gpus: int) -> None:
    job = dataclasses.replace(JOB, gpus_per_node=gpus)
    task = yaml.safe_load(render_task(job))
    validator = Draft202012Validator(read_schema("skypilot"))
    validator.validate(task)
    assert task["num_nodes"] == 2 and task["volumes"] == {"/data": "shared"}
    assert task["resources"]["cpus"] == "48+"
    assert task["resources"].get("accelerators") == ({"H100": 8} if gpus else None)
    for change in ({"num_nodes": "2"}, {"resources": {"gpus": 8}}, {"nodes": 2}):
        assert not validator.is_valid({**task, **change})


def follow_policies(jobset: Any, *, exit_code: int = 0, condition: str = "") -> str:
    """What Kubernetes and JobSet do after a pod's end, by their documented order of rules."""
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {"values": []})["values"]
        kinds = [pattern["type"] for pattern in rule.get("onPodConditions", [])]
        if exit_code in codes:
            message = f"Container {CONTAINER} for pod a/b failed with exit code {exit_code}"
        elif condition in kinds:
            message = f"Pod a/b has condition {condition}"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{message} matching FailJob rule at index {index}"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return str(rule["action"])
    return "RestartJobSet"


def test_the_exit_codes_of_a_node_lead_to_the_same_actions_as_under_slurm() -> None:
    jobset = list(yaml.safe_load_all(render_jobset(JOB)))[1]
    freely = "RestartJobSetAndIgnoreMaxRestarts"
    assert follow_policies(jobset, exit_code=START_AGAIN) == freely
    assert follow_policies(jobset, exit_code=137, condition="DisruptionTarget") == freely
    for name in ("failed", "usage"):
        assert follow_policies(jobset, exit_code=EXIT_CODES[name]) == "FailJobSet"
    for killed in (137, 139, NO_DECISION):
        assert follow_policies(jobset, exit_code=killed) == "RestartJobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == JOB.max_requeues
    recovery = yaml.safe_load(render_task(JOB))["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [START_AGAIN]}


def make_environment(records: Path, recipe: Path) -> dict[str, str]:
    """What the first node finds, on Kubernetes or SkyPilot, and where RECORD writes."""
    return {
        **os.environ,
        "RECORDS": str(records),
        "RECIPE": str(recipe),
        "JOB_COMPLETION_INDEX": "0",
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_TASK_ID": "sky-1",
    }


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    target=st.sampled_from(TARGETS),
    override=texts,
    folder=names,
    python=names,
    image=texts,
    command=texts,
    recipe=st.text(st.sampled_from(NASTY + "\n\t#: "), min_size=1, max_size=40),
)
@example("kubernetes", "$(HOME)", "-a b", "a b", "$(x)", "a\u2028@b '''", "a: $(b) $$\n")
@example("skypilot", "`id`", "a'b", "py", "x", "y", "END_OF_RECIPE\nEND_OF_RECIPE_\n")
@pytest.mark.seconds
def test_every_value_arrives(
    target: CloudTarget,
    override: str,
    folder: str,
    python: str,
    image: str,
    command: str,
    recipe: str,
) -> None:
    with tempfile.TemporaryDirectory() as root:
        volume, tools = f"{root}/{folder}", Path(root, "tools", python)
        tools.mkdir(parents=True)
        (tools / "py").write_text(RECORD)
        (tools / "py").chmod(0o755)
        records = Path(root, "records")
        records.mkdir()
        job = dataclasses.replace(
            JOB,
            recipe="",
            recipe_text=recipe,
            nodes=1,
            run_dir=f"{volume}/run",
            overrides=(f"data.root={override}",),
            container=image,
            python=str(tools / "py"),
            volumes=(CloudVolume("shared", volume),),
            command=command,
        )
        documents = list(yaml.safe_load_all(RENDER[target](job)))
        text = get_script(target, documents).replace("sleep 1 & wait $!", "sleep 0.01")
        env = make_environment(records, Path(root, "recipe"))
        command_line = ["bash", "-c", text]
        done = subprocess.run(command_line, env=env, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        calls = [
            [os.fsdecode(word) for word in path.read_bytes().split(b"\0")[:-1]]
            for path in records.iterdir()
        ]
        (training,) = [call for call in calls if "onellm_dist.train" in call]
        given_recipe, *rest = training[training.index("onellm_dist.train") + 1 :]
        assert rest == [f"data.root={override}", f"run.dir={volume}/run"]
        (begin,) = [call for call in calls if "begin" in call]
        assert begin[begin.index("begin") + 1] == f"{volume}/run"
        assert Path(volume, "run", "nodes", "exit_code").read_text() == "0\n"
        if target == "kubernetes":
            assert given_recipe == "/etc/onellm/recipe.yaml"
            assert documents[0]["data"]["recipe.yaml"] == recipe
            pod = documents[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            assert container["image"] == image
            assert container["volumeMounts"][-1]["mountPath"] == volume
        else:
            assert Path(root, "recipe").read_text("utf-8").removesuffix("\n") == (
                recipe.removesuffix("\n")
            )
            assert documents[0]["resources"]["image_id"] == f"docker:{image}"
            assert documents[0]["volumes"] == {volume: "shared"}


@given(st.one_of(st.sampled_from(NUMBERS), texts, st.text(max_size=20)))
def test_a_text_is_a_text_for_every_reader_of_yaml(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    written = format_yaml([{"key": text, "list": [text]}], ["a comment"])
    assert yaml.safe_load(written) == {"key": text, "list": [text]}
    node = yaml.compose(written)
    assert isinstance(node, yaml.MappingNode)
    value = node.value[0][1]
    if value.style is None:  # bare: it must not be a number or a truth value by any version
        truth = "y n yes no on off true false null"
        assert re.fullmatch(r"[A-Za-z/][\w./-]*", text) and text.lower() not in truth.split()


def test_a_list_that_is_used_twice_is_written_twice() -> None:
    shared = ["a"]
    assert format_yaml([{"one": shared, "other": shared}], []).count("- a") == 2


@pytest.mark.parametrize(
    ("target", "fields", "word"),
    [
        ("kubernetes", {"container": ""}, "--container"),
        ("skypilot", {"accelerator": ""}, "--accelerator"),
        ("skypilot", {"accelerator": "H100:8"}, "--accelerator"),
        ("kubernetes", {"ranks_per_node": 0}, "--ranks-per-node"),
        ("kubernetes", {"name": "stage_1"}, "--job-name"),
        ("kubernetes", {"name": "a" * 41}, "--job-name"),
        ("kubernetes", {"grace_period_s": 0}, "--grace-period"),
        ("skypilot", {"overrides": ("a=b\nc",)}, "control character"),
        ("kubernetes", {"command": "a\x85b"}, "control character"),
        ("kubernetes", {"container": "a\x1bb"}, "control character"),
    ],
)
def test_what_cannot_work_in_a_container_is_refused(
    target: CloudTarget, fields: dict[str, Any], word: str
) -> None:
    check_cloud_job(JOB, target)
    with pytest.raises(UsageError, match=word):
        check_cloud_job(dataclasses.replace(JOB, **fields), target)


def make(recipe: Path, *overrides: str, **options: Any) -> CloudJob:
    given: dict[str, Any] = {
        "target": "kubernetes",
        "nodes": "2",
        "volumes": ["shared:/data"],
        "gpus_per_node": 8,
        "container": "x",
    }
    return make_cloud_job(recipe, ["run.dir=/data/run", *overrides], **(given | options))


def test_what_ends_with_its_container_is_refused(tmp_path: Path) -> None:
    on_volume = ("data.root=/data/shards", "model.path=/data/model")
    job = make(Path("stage1_image"), *on_volume)
    assert (job.recipe, job.name, job.run_dir) == ("stage1_image", "stage1-image", "/data/run")
    assert make(Path("stage1_image"), "data.root=s3://bucket/x", on_volume[1]).recipe_text == ""
    for key, value in (
        ("run.dir", "runs/x"),
        ("run.dir", "/database/x"),
        ("run.dir", "/data/../x"),
        ("data.root", "/shards"),
        ("model.path", "models/x"),
    ):
        with pytest.raises(UsageError, match=rf"{key}=.*not on a volume \(/data\)"):
            make(Path("stage1_image"), *on_volume, f"{key}={value}")
    with pytest.raises(UsageError, match="not on a volume") as error:
        make(Path("stage1_image"), "run.dir=a", "data.root=/b", "model.path=c")
    for key, path in (("run.dir", "a"), ("data.root", "/b"), ("model.path", "c")):
        assert f"{key}={path}" in str(error.value) and f"--set {key}=/data/..." in str(error.value)
    with pytest.raises(UsageError, match="fixed number of nodes"):
        make(Path("stage1_image"), *on_volume, nodes="1-4")
    for volume in ("shared", "shared:data", "Shared:/data", "shared:/", "a:/b:c", "a:/b/../c"):
        with pytest.raises(UsageError, match=r"--volume .* is not NAME:/PATH"):
            make(Path("stage1_image"), *on_volume, volumes=[volume])
    own = tmp_path / "_7 mine.yaml"
    own.write_text("base: stage1_image # of the paper\nrun: {dir: /data/run}\n")
    job = make(own, *on_volume)
    assert (job.recipe, job.recipe_text, job.name) == ("", own.read_text(), "onellm-7-mine")
    (tmp_path / "other.yaml").write_text(f"base: '{own.name}'\n")
    with pytest.raises(UsageError, match="is built on"):
        make(tmp_path / "other.yaml", *on_volume)


LINE = (
    "launch toy/align_image --container x --volume shared:/data --gpus-per-node 0 "
    "--ranks-per-node 2 --set run.dir=/data/run --set data.root=/data/toy"
)


@pytest.mark.seconds
def test_launch_writes_the_file_that_it_prints(tmp_path: Path) -> None:
    for target, command in (("kubernetes", "kubectl apply -f"), ("skypilot", "sky jobs launch")):
        line = [*LINE.split(), "--to", target]
        printed = CliRunner().invoke(app, line)
        assert printed.exit_code == 0, printed.output
        out = tmp_path / "a folder" / f"{target}.yaml"
        written = CliRunner().invoke(app, [*line, "--out", str(out)])
        assert f"start it: {command} '{out}'" in written.output
        assert out.read_text("utf-8") == printed.output


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--to", "kubernetes", "--partition", "gpu"], "--partition: not with --to kubernetes"),
        (["--to", "kubernetes", "--with", "srun"], "--with: not with --to kubernetes"),
        (
            ["--to", "kubernetes", "--accelerator", "H100"],
            "--accelerator: not with --to kubernetes",
        ),
        (["--to", "skypilot", "--array", "optim.lr=1,2"], "--array: not with --to skypilot"),
        (["--to", "skypilot", "--preflight", "--submit"], "--preflight, --submit: not with"),
        (["--to", "mesos"], "--to mesos is unknown"),
        ([], "--volume: not with --to slurm"),
    ],
)
def test_options_without_a_meaning_are_refused(options: list[str], word: str) -> None:
    result = CliRunner().invoke(app, [*LINE.split(), *options])
    assert isinstance(result.exception, UsageError) and word in str(result.exception)
