"""One place for version and dependencies, and an sdist and a wheel that agree with it."""

from __future__ import annotations

import ast
import configparser
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml

ROOT = Path(__file__).parents[1]
OPTIONAL = {
    "flash_attn": "the extra flash, or a build of the user's own",
    "flash_attn_interface": "FlashAttention-3, which is not on PyPI",
    "gguf": "the extra gguf",
    "lmms_eval": "it asks for an older PyAV, so it has an environment of its own",
    "megatron": "Energon's reader is only compared with",
}
MODULES = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "google": "tensorboard",
}
"""Import names that are not the distribution's."""


@pytest.fixture(scope="module")
def metadata() -> configparser.ConfigParser:
    """The parsed setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> set[str]:
    """Distribution names of a requirements list, normalised."""
    names = (re.match(r"[A-Za-z0-9_.-]+", line.strip()) for line in text.splitlines())
    return {m.group().lower().replace("-", "_") for m in names if m}


def test_the_version_stands_in_one_place(metadata: configparser.ConfigParser) -> None:
    version = metadata["metadata"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["version"] == version
    assert re.search(rf"^## \[?{re.escape(version)}\]?", changes, re.M)


@pytest.mark.seconds
def test_every_import_is_declared(metadata: configparser.ConfigParser) -> None:
    declared = requirements(metadata["options"]["install_requires"])
    for extra in metadata["options.extras_require"].values():
        declared |= requirements(re.sub(r"\[.*?\]", "", extra))
    imported: dict[str, str] = {}
    for path in (ROOT / "onellm_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
            for name in names:
                imported[name.split(".")[0]] = str(path.relative_to(ROOT))
    ours = {"onellm_dist", *OPTIONAL, *sys.stdlib_module_names}
    missing = {
        name: where
        for name, where in imported.items()
        if name not in ours and MODULES.get(name, name).lower().replace("-", "_") not in declared
    }
    assert not missing


def test_every_shipped_pattern_finds_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignore(**_: Any) -> None:
        """Stands for setuptools.setup."""

    monkeypatch.setattr(setuptools, "setup", ignore)
    patterns = runpy.run_path(str(ROOT / "setup.py"))["SHIPPED"]
    assert all(any(ROOT.glob(pattern)) for pattern in patterns)


@pytest.mark.seconds
def test_setup_says_what_went_wrong(tmp_path: Path) -> None:
    """A package index without our packages: pip's reason is shown, and what to do about it."""
    copy = tmp_path / "a checkout"
    copy.mkdir()
    for name in (
        "setup.cfg",
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
    ):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        ["bash", str(ROOT / "launch/setup_machine.sh"), sys.executable, ".venv"],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "No matching distribution" in done.stderr and "PIP_FIND_LINKS" in done.stdout


def test_another_build_of_torch_is_installed_first_and_its_pins_are_left_out(
    tmp_path: Path,
) -> None:
    """`ONELLM_TORCH`: the smaller install for a machine without a GPU. Pip is only recorded."""
    (tmp_path / "constraints.txt").write_bytes((ROOT / "constraints.txt").read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> calls\n'
        'while [ $# -gt 0 ]; do [ "$1" != --constraint ] || cat "$2" > pins; shift; done\n'
    )
    python.chmod(0o755)
    torch = "torch torchvision --index-url https://download.pytorch.org/whl/cpu"
    subprocess.run(
        ["bash", str(ROOT / "launch/setup_machine.sh"), sys.executable, ".venv"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "ONELLM_TORCH": torch, "ONELLM_EXTRAS": "remote"},
    )
    installs = [c for c in (tmp_path / "calls").read_text().splitlines() if "pip install" in c]
    assert len(installs) == 2
    assert installs[0].endswith(torch)
    assert installs[1].endswith("--editable .[remote]")
    every, kept = ((tmp_path / f).read_text().splitlines() for f in ("constraints.txt", "pins"))
    left_out = [line for line in every if line not in kept]
    assert {line.split("==")[0] for line in left_out} >= {"torch", "torchvision", "triton"}
    assert not any(line.startswith(("torch==", "nvidia-", "cuda-")) for line in kept)
    assert any(line.startswith("transformers==") for line in kept)


@pytest.mark.slow
def test_the_sdist_has_every_folder(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), "."],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = subprocess.run(
        ["git", "ls-files", "launch", "ds_configs", "shards", "examples"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(wanted.stdout.split()) <= names
    for_the_clone = {"Makefile", "CONTRIBUTING.md", "mkdocs.yml", "noxfile.py"}
    assert not names & for_the_clone, "they speak of folders that the sdist does not have"
