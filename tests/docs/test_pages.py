"""Every command in the documentation is run, or its block says why not; it is parsed at least.

`make test` runs them without the seconds of imports that each would cost; `make soak` has them all.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from forked_python import get_programs
from pages import (
    ROOT,
    SETUP,
    Block,
    blocks,
    commands,
    commands_without_language,
    pages,
    script,
    strip_comment,
)

from onellm_dist.cli import app
from onellm_dist.cli.generate import add_modality_options
from onellm_dist.common import plugins
from onellm_dist.modalities.registry import all_modalities

RUN = [page for page in pages() if any(not block.reason for block in blocks(page))]
CONTINUES = {"docs/quickstart.md": "README.md"}
"""Pages for people who may have read another: walked after it, without what it ran already."""
SHELL_END = ("|", ">", "&&", ";", "&", "<", "2>&1")


@pytest.fixture(scope="module")
def onellm() -> Iterator[Any]:
    """The command tree of `onellm`, with the modality that a tutorial installs."""
    point = EntryPoint("thermal", "thermal_package:MODALITY", plugins.MODALITIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples/thermal")
        patch.setattr(plugins, "entry_points", lambda group: [point])
        all_modalities.cache_clear()
        add_modality_options()
        yield typer.main.get_command(app)
    sys.modules.pop("thermal_package", None)
    all_modalities.cache_clear()
    add_modality_options()


def test_a_block_that_is_not_run_says_why() -> None:
    every = [block for page in pages() for block in blocks(page)]
    assert every
    assert not [f"{b.page}:{b.line}" for b in every if b.reason is not None and len(b.reason) < 8]


def test_each_command_that_is_left_out_of_a_block_stands_in_one() -> None:
    run = [block for page in pages() for block in blocks(page) if block.reason is None]
    lines = {strip_comment(line) for block in run for line in block.code.splitlines()}
    assert {*SETUP} <= lines


@pytest.mark.parametrize("page", pages())
def test_a_block_of_commands_has_a_language(page: str) -> None:
    """Without one it would be neither run nor checked."""
    assert not [f"{page}:{line}" for line in commands_without_language(page)]


@pytest.mark.parametrize("page", pages())
def test_every_command_exists_with_its_options(page: str, onellm: Any) -> None:
    wrong = []
    for block in blocks(page):
        if block.language != "bash":
            continue
        for words in commands(block):
            end = next((i for i, word in enumerate(words) if word in SHELL_END), len(words))
            problem = problem_of(onellm, words[:end])
            if problem:
                wrong.append(f"line {block.line}: onellm {' '.join(words)}: {problem}")
    assert not wrong, "\n".join(wrong)


def problem_of(command: Any, words: list[str]) -> str | None:
    """What the command line would refuse without running anything; None: nothing."""
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands"):
        return None if not words or words[0].startswith("-") else f"no command {words[0]}"
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    if command.context_settings.get("ignore_unknown_options"):
        return None
    words = words[: words.index("--")] if "--" in words else words  # arguments of another command
    given = [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
    unknown = [word for word in given if word not in known]
    return f"no option {unknown[0]}" if unknown else None


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN if page not in CONTINUES])
def test_the_blocks_of_a_page_run_in_order(page: str, tmp_path: Path) -> None:
    run_page(page, tmp_path, get_programs())


@pytest.mark.slow
def test_the_forked_programs_do_as_the_real_ones(tmp_path: Path) -> None:
    """Arguments, folder, environment, input, exit codes and signals; killed, none goes on."""
    python = str(get_programs() / "python")
    show = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['ASKED'], input())"
    done = subprocess.run(
        [python, "-c", show, "a b"],
        input="yes\n",
        cwd=tmp_path,
        env={**os.environ, "ASKED": "x"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"['a b'] {tmp_path} x yes\n"
    for end, code in (("sys.exit(3)", 3), ("os.kill(os.getpid(), 15)", -15), ("1 / 0", 1)):
        command = [python, "-c", f"import os, sys\n{end}"]
        assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == code
    for number in (signal.SIGUSR1, signal.SIGKILL):
        wait = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        with subprocess.Popen([python, "-c", wait], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            process.send_signal(number)
            assert process.wait(60) == -number
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists():
            assert pid != process.pid and time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.soak
@pytest.mark.parametrize("page", [page for page in RUN if page not in CONTINUES])
def test_the_blocks_of_a_page_run_with_every_import(page: str, tmp_path: Path) -> None:
    run_page(page, tmp_path, Path(sys.executable).parent)


def run_page(page: str, folder: Path, programs: Path) -> None:
    """Run the blocks of a page, and of those that continue it, in `folder`."""
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples", folder / "examples")  # pip builds in a folder of a package
    ran: set[str] = set()
    for each in (page, *(later for later, first in CONTINUES.items() if first == page)):
        for block in blocks(each):
            if block.reason is not None:
                continue
            code = what_is_left(block, ran if each != page else set())
            ran.update(commands_of(block))
            done = run(block.language, code, folder, programs)
            assert done.returncode == 0, (
                f"{each}:{block.line}\n{code}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )


def commands_of(block: Block) -> list[str]:
    """A shell block line by line, continuations joined; a Python block whole."""
    if block.language == "bash":
        return script(block).replace("\\\n", " ").splitlines()
    return [block.code]


def what_is_left(block: Block, ran: set[str]) -> str:
    """A block without the commands (of ours) or the Python that an earlier page ran."""
    left = [
        part
        for part in commands_of(block)
        if part not in ran or (block.language == "bash" and not part.startswith("onellm "))
    ]
    return "\n".join(left)


def run(language: str, code: str, folder: Path, programs: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a reader would, in `folder`, with the `python` and `onellm` of `programs`.

    What it installs goes to a folder of the test; what is needed for that is there already.
    """
    installed = folder / "installed"
    command = (
        ["bash", "-euo", "pipefail", "-c", code]
        if language == "bash"
        else [str(programs / "python"), "-c", code]
    )
    env = {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{installed}:{ROOT}",
        "PIP_TARGET": str(installed),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the value of --build-isolation
        "PIP_NO_INDEX": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=600
    )
