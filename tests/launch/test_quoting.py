"""Every value of a job survives the shells between the script and the ranks, or is refused."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onellm_dist.common.errors import UsageError
from onellm_dist.launch.arguments import decode_argument, encode_argument
from onellm_dist.launch.slurm.job import SlurmJob, check_job
from onellm_dist.launch.slurm.script import render
from onellm_dist.launch.slurm.submit import submit_script

NASTY = "a Z9'\"$`;&|<>(){}[]*?!#~\\=%:,@+-_.^é漢😀\u2028"
texts = st.text(st.sampled_from(NASTY), min_size=1, max_size=12)
names = texts.map(lambda text: text.strip(".") or "a")
RECORD = """#!/bin/bash
printf '%s\\0' "$@" >"$(mktemp "$RECORDS/{name}.XXXXXX")"
{body}
"""
TOOLS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "apptainer": 'while [ "$1" != "$PYTHON" ]; do shift; done; exec "$@"',
    "deepspeed": "",
    "pdsh": "",
    "scontrol": "[ $1 != show ] || echo n1",
    "python": 'case " $* " in *" end "*) echo done 0 0 ;; esac',
}


class Shell:
    """Runs job scripts with tools that write down how they were called."""

    def __init__(self, folder: Path, python: str = "python") -> None:
        self.tools, self.records = folder / "tools", folder / "records"
        self.python = self.tools / python
        for made in (self.tools, self.records, self.python.parent):
            made.mkdir(parents=True, exist_ok=True)
        for name, body in TOOLS.items():
            path = self.python if name == "python" else self.tools / name
            path.write_text(RECORD.format(name=name, body=body))
            path.chmod(0o755)

    def run(self, text: str, folder: Path, *arguments: str) -> None:
        env = {
            **os.environ,
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "RECORDS": str(self.records),
            "PYTHON": str(self.python),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n1",
        }
        text = text.replace("sleep 1 & wait $!", "sleep 0.01")
        command = ["bash", "-c", text, "job", *arguments]
        done = subprocess.run(
            command, env=env, cwd=folder, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr

    def calls(self, tool: str) -> list[list[str]]:
        return [
            [os.fsdecode(word) for word in path.read_bytes().split(b"\0")[:-1]]
            for path in self.records.glob(f"{tool}.*")
        ]

    def training(self, tool: str = "python") -> list[str]:
        (call,) = [c for c in self.calls(tool) if "onellm_dist.train" in c]
        return call[call.index("onellm_dist.train") + 1 :]


@settings(max_examples=12, deadline=None)
@given(
    starter=st.sampled_from(["srun", "torchrun"]),
    container=st.sampled_from(["", "pyxis", "apptainer"]),
    recipe=names,
    override=texts,
    folder=names,
    python=names,
    image=names,
)
@example("srun", "", "-x", "run.dir=$(touch /tmp/x)", "-a b", "a b", "x")
def test_a_job_script_passes_every_value_on(
    starter: Any, container: Any, recipe: str, override: str, folder: str, python: str, image: str
) -> None:
    with tempfile.TemporaryDirectory() as root:
        shell = Shell(Path(root), f"{python}/py")
        overrides = (f"data.root={override}", f"run.dir={folder}")
        mount = f"/{folder}".replace(":", ".").replace(",", ".")
        job = SlurmJob(
            recipe=recipe,
            run_dir=Path(folder),
            nodes=(1, 1),
            gpus_per_node=0,
            ranks_per_node=2,
            overrides=overrides,
            starter=starter,
            container=image if container else "",
            container_runtime=container or "pyxis",
            mounts=(mount,) if container else (),
            python=str(shell.python),
        )
        check_job(job)
        work = Path(root) / "work"
        work.mkdir()
        shell.run(render(job), work)
        assert shell.training() == [recipe, *overrides]
        assert [path.name for path in work.iterdir()] == [Path(folder).parts[0]]
        begins = [call for call in shell.calls("python") if "begin" in call]
        assert Path(begins[0][begins[0].index("begin") + 1]) == Path(folder)
        if container == "pyxis":
            ((options, *_),) = [c for c in [shell.calls("srun")] if c]
            assert f"--container-image={image}" in options
            assert any(option.endswith(f",{mount}:{mount}") for option in options)
        if container == "apptainer":
            assert all(image in call and mount in call for call in shell.calls("apptainer"))


@settings(max_examples=8, deadline=None)
@given(names, texts, texts, st.booleans())
@example("a", "$HOME `id` ; x", "'\"\\", True)
@pytest.mark.seconds
def test_what_the_deepspeed_runner_hands_to_a_shell_arrives(
    recipe: str, one: str, two: str, any_recipe: bool
) -> None:
    with tempfile.TemporaryDirectory() as root:
        shell = Shell(Path(root))
        values = [f"data.root={one}", two]
        job = SlurmJob(
            recipe="" if any_recipe else recipe,
            run_dir=Path("run"),
            nodes=(1, 1),
            gpus_per_node=0,
            ranks_per_node=2,
            overrides=() if any_recipe else tuple(values),
            starter="deepspeed",
        )
        check_job(job)
        expected = [recipe, *values]
        if any_recipe:
            expected.append("run.dir=run")
            tools = Shell(Path(root))
            tools.python.write_text(f"#!/bin/bash\n{ENCODE}")
        shell.run(render(job), Path(root), *(["run", recipe, *values] if any_recipe else []))
        given = shell.training("deepspeed")
        for program in ("bash", "sh"):
            assert pass_through_pdsh(given, program) == expected


ENCODE = """
printf '%s\\0' "$@" >"$(mktemp "$RECORDS/python.XXXXXX")"
case " $* " in
*" end "*) echo done 0 0 ;;
*launch.arguments*) shift 2; exec {python} {file} "$@" ;;
esac
""".format(
    python=shutil.which("python"),
    file=Path(__file__).parents[2] / "onellm_dist" / "launch" / "arguments.py",
)


def pass_through_pdsh(arguments: list[str], shell: str) -> list[str]:
    """What a rank is given when DeepSpeed's own runner starts it through ssh's shell."""
    options = argparse.Namespace(user_args=arguments, user_script="x", launcher_args="")
    words = PDSHRunner(options, "").user_arguments
    line = " ".join(["printf", "'%s\\0'", *words])
    done = subprocess.run([shell, "-c", line], capture_output=True, check=True)
    return [decode_argument(os.fsdecode(word)) for word in done.stdout.split(b"\0")[:-1]]


@given(st.text())
def test_encoded_arguments_have_no_character_of_a_shell(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    encoded = encode_argument(text)
    assert decode_argument(encoded) == text
    assert not set(encoded) & set(" \t\n'\"$`;&|<>(){}[]*?!#~\\^")
    assert not any(escape in encoded for escape in ("%h", "%n", "%u", "%%"))


JOB = SlurmJob("x", Path("run"), (1, 1), 8, 8)


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b"])
@pytest.mark.parametrize("field", ["recipe", "run_dir", "python", "container", "command"])
def test_line_breaks_are_refused_wherever_they_are(field: str, character: str) -> None:
    value = f"a{character}rm -rf x"
    changed: dict[str, Any] = {field: Path(value) if field == "run_dir" else value}
    with pytest.raises(UsageError, match="control character"):
        check_job(dataclasses.replace(JOB, **changed))
    lists: list[dict[str, Any]] = [
        {"overrides": (value,)},
        {"mounts": (value,), "container": "x"},
    ]
    for more in lists:
        with pytest.raises(UsageError, match="control character"):
            check_job(dataclasses.replace(JOB, **more))


@pytest.mark.parametrize("value", ["a b", "a;b", "a}b", "$(x)", "a'b", "a>b"])
def test_values_of_the_header_are_plain(value: str) -> None:
    for field in ("name", "partition", "account", "qos", "exclude"):
        changed: dict[str, Any] = {field: value}
        with pytest.raises(UsageError, match="shell characters"):
            check_job(dataclasses.replace(JOB, **changed))


def test_what_no_quoting_helps_is_refused() -> None:
    with pytest.raises(UsageError, match="--with deepspeed"):
        check_job(dataclasses.replace(JOB, starter="deepspeed", python="/a b/python"))
    for mount in ("/a:b", "/a,b"):
        with pytest.raises(UsageError, match="colon or a comma"):
            check_job(dataclasses.replace(JOB, container="x", mounts=(mount,)))


def test_deepspeed_is_not_started_from_a_folder_that_it_would_not_quote(tmp_path: Path) -> None:
    shell, folder = Shell(tmp_path), tmp_path / "a b"
    folder.mkdir()
    text = render(dataclasses.replace(JOB, starter="deepspeed"))
    with pytest.raises(AssertionError, match="does not quote spaces"):
        shell.run(text, folder)
    assert not shell.calls("deepspeed")


def test_hints_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UsageError) as info:
        submit_script(Path("/a b/it's.sbatch"))
    assert info.value.do.endswith("""sbatch '/a b/it'"'"'s.sbatch'""")


def test_steps_get_the_environment_also_under_export_none() -> None:
    """srun reads SLURM_EXPORT_ENV, which `sbatch --export=NONE` sets to NONE."""
    text = render(JOB)
    head = text[: text.index("\nsrun")]
    program = f"{head.partition('set -u')[0]}\nenv"
    env = {"SLURM_EXPORT_ENV": "NONE", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert {"SLURM_EXPORT_ENV=ALL", "PYTHONSAFEPATH=1"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_gets_expandable_segments_unless_the_user_says_something(name: str) -> None:
    head = render(JOB).partition("set -u")[0]

    def run(**env: str) -> set[str]:
        command = ["bash", "-euc", f"{head}\nenv"]
        env |= {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return {line for line in done.stdout.splitlines() if "ALLOC" in line}

    assert run() == {"PYTORCH_ALLOC_CONF=expandable_segments:True"}
    assert run(**{name: "max_split_size_mb:64"}) == {f"{name}=max_split_size_mb:64"}
