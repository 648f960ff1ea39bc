"""`make bounds`: tests at the oldest and the newest versions, and of sdist and wheel.

Slow tests are left out; those marked `seconds` are not.

Each session makes an environment of its own (about 6 GB with torch). They are not part of
`make test`. An interpreter that is not installed is skipped with a word.
"""

from __future__ import annotations

import configparser
import os
import pwd
import subprocess
from pathlib import Path

import nox

ROOT = Path(__file__).parent
FAST = ("-m", "not slow and not soak", "-p", "no:cacheprovider", "-n", "3", "--dist", "loadfile")
NO_TEST_TOOLS = ("ruff", "mypy", "import-linter", "pre-commit", "types-", "build")
"""What of the extra `dev` no test needs."""
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
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["oldest", "pinned", "newest", "package"]


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
    resolve = "uv pip compile setup.cfg --python-version 3.10 --resolution lowest-direct"
    quiet = ["--no-annotate", "--quiet", "--output-file", str(lowest)]
    session.run(*resolve.split(), *quiet, external=True)
    # The package of the Kubernetes schemas asks for a newer pydantic than we do, trl for a newer
    # pyarrow. uv says so where versions cannot be had together; pip tries them for an hour.
    tools = list_test_tools("kubeflow-trainer-api", "trl")
    python = str(Path(session.bin) / "python")
    install = ["uv", "pip", "install", "--quiet", "--python", python, "-c", str(lowest)]
    session.run(*install, "-e", ".", *tools, external=True)
    run_fast_tests(session)


@nox.session(python=["3.11", "3.12"])
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
    session.run("onellm", "shards", "build", "toyworld", "toy", "-o", "train=8", "-o", "test=2")
    keys = "data.root=toy train.steps=2 data.global_batch=4 launch.ranks=1 run.dir=run"
    session.run("onellm", "train", "toy/align_image", *keys.split())
    if os.getuid() == 0:
        run_doctor_as_nobody(session, empty / "nobody")


def run_doctor_as_nobody(session: nox.Session, home: Path) -> None:
    """Run `onellm doctor` without root, unless the interpreter lies where only root may look."""
    home.mkdir(exist_ok=True)
    os.chown(home, pwd.getpwnam("nobody").pw_uid, -1)
    as_nobody = ["setpriv", "--reuid=nobody", "--clear-groups", "env", f"HOME={home}"]
    python = str(Path(session.bin) / "python")
    if subprocess.run([*as_nobody, python, "-c", ""], check=False, cwd="/").returncode:
        session.warn(f"not run as another user: only root can run {Path(python).resolve()}")
        return
    session.run(
        *as_nobody, str(Path(session.bin) / "onellm"), "doctor", external=True, success_codes=[0, 1]
    )
