"""`make bounds`: tests at the oldest and the newest versions, and of sdist and wheel.

Slow tests are left out; those marked `seconds` are not.

Each session makes an environment of its own (about 6 GB with torch). They are not part of
`make test`. A session whose interpreter is not installed fails.
"""

from __future__ import annotations

import configparser
import os
import pwd
import shlex
import subprocess
import urllib.request
from pathlib import Path

import nox

ROOT = Path(__file__).parent
FAST = ("-m", "not slow and not soak", "-p", "no:cacheprovider", "-n", "3", "--dist", "loadfile")
NO_TEST_TOOLS = ("ruff", "mypy", "import-linter", "pre-commit", "types-", "build")
"""What of the extra `dev` no test needs."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD = "shards build toyworld toy -o train=8 -o test=2"
TRAIN = (
    "train toy/align_image data.root=toy train.steps=2 data.global_batch=4 "
    "launch.ranks=1 run.dir=run"
)
CHECK_INSTALLED = """
import onellm_dist
from onellm_dist.common.resources import ds_configs_dir, recipes_dir, shard_recipes_dir
from onellm_dist.config.load import load_config

assert "site-packages" in onellm_dist.__file__, onellm_dist.__file__
assert all(any(d.iterdir()) for d in (recipes_dir(), shard_recipes_dir(), ds_configs_dir()))
load_config("toy/align_image")
"""

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["oldest", "pinned", "newest", "package", "cpu"]


def run_fast_tests(session: nox.Session) -> None:
    """Run the fast suite with this session's interpreter."""
    session.run("python", "-m", "pytest", *FAST, *session.posargs, env={"OMP_NUM_THREADS": "1"})


def list_test_tools(*without: str) -> list[str]:
    """Requirements of the extra `dev` that tests need, less those that begin so."""
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    every = metadata["options.extras_require"]["dev"].split("\n")
    return [line for line in every if line and not line.startswith((*NO_TEST_TOOLS, *without))]


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The lower bounds of setup.cfg, as uv resolves them."""
    lowest = Path(session.create_tmp()) / "lowest.txt"
    options = shlex.split("--python-version 3.10 --resolution lowest-direct --no-annotate --quiet")
    session.run(
        *("uv", "pip", "compile", "setup.cfg", *options, "--output-file", str(lowest)),
        external=True,
    )
    # The package of the Kubernetes schemas asks for a newer pydantic than we do, trl for a newer
    # pyarrow. uv says so where versions cannot be had together; pip tries them for an hour.
    tools = list_test_tools("kubeflow-trainer-api", "trl")
    python = str(Path(session.bin) / "python")
    session.run(
        *("uv", "pip", "install", "--quiet", "--python", python),
        *("-c", str(lowest), "-e", ".", *tools),
        external=True,
    )
    run_fast_tests(session)


@nox.session(python=["3.10", "3.11", "3.12"])
def pinned(session: nox.Session) -> None:
    """The versions of constraints.txt."""
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    run_fast_tests(session)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The newest version of everything."""
    session.install("--upgrade", "-e", ".[dev]")
    run_fast_tests(session)


@nox.session(python="3.11")
def package(session: nox.Session) -> None:
    """Sdist and wheel in an empty directory, as a user without root where we may become one."""
    out = Path(session.create_tmp()).resolve()
    session.install("build")
    session.run("python", "-m", "build", "--sdist", "--outdir", str(out))
    sdist = next(out.glob("onellm_dist-*.tar.gz"))
    session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(sdist))
    wheel = next(out.glob("onellm_dist-*.whl"))
    session.install("-c", "constraints.txt", str(wheel))
    empty = out / "empty"
    empty.mkdir(exist_ok=True)
    session.chdir(empty)
    session.run("python", "-c", CHECK_INSTALLED)
    session.run("onellm", "--help", silent=True)
    for line in (BUILD, TRAIN):
        session.run("onellm", *shlex.split(line))
    if os.getuid() == 0:
        run_as_nobody(session, out / "nobody")


def run_as_nobody(session: nox.Session, home: Path) -> None:
    """Build shards and train without root, unless the interpreter lies where only root may look."""
    home.mkdir(exist_ok=True)
    os.chown(home, pwd.getpwnam("nobody").pw_uid, -1)
    as_nobody = ["setpriv", "--reuid=nobody", "--clear-groups", "env", f"HOME={home}"]
    python = str(Path(session.bin) / "python")
    if subprocess.run([*as_nobody, python, "-c", ""], check=False, cwd="/").returncode:
        session.warn(f"not run as another user: only root can run {Path(python).resolve()}")
        return
    session.chdir(home)
    onellm = str(Path(session.bin) / "onellm")
    # The doctor reports what this machine lacks with 1; it must come to its end.
    session.run(*as_nobody, onellm, "doctor", external=True, success_codes=[0, 1])
    for line in (BUILD, TRAIN):
        session.run(*as_nobody, onellm, *shlex.split(line), external=True)


@nox.session(python="3.11")
def cpu(session: nox.Session) -> None:
    """The smaller install for machines without a GPU, by the command of docs/install.md."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=30):
            pass
    except OSError as error:
        session.skip(f"{CPU_INDEX} is not reached here: {error}")
    venv = Path(session.create_tmp()).resolve() / "venv"
    torch = f"torch torchvision --index-url {CPU_INDEX}"
    python = str(Path(session.bin) / "python")
    session.run(
        *("bash", "launch/setup_machine.sh", python, str(venv)),
        env={"ONELLM_TORCH": torch, "ONELLM_EXTRAS": "remote"},
        external=True,
    )
    packages = subprocess.check_output([str(venv / "bin/python"), "-m", "pip", "list"], text=True)
    if "nvidia-" in packages:
        session.error(f"packages of CUDA were installed:\n{packages}")
    session.chdir(session.create_tmp())
    for line in (BUILD, TRAIN):
        session.run(str(venv / "bin/onellm"), *shlex.split(line), external=True)
