"""The arrows of docs/architecture.md: who may import whom, and which names stay in which room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "onellm_dist"
LEAVES = {"errors", "packed", "config", "resources", "progress", "charts", "webpage", "files"}
MAY_IMPORT = {
    "modalities": set(),
    "model": {"modalities"},
    "data": {"modalities", "shards.format", "shards.index"},
    "shards": {"modalities"},
    "launch": set(),
    "slurm": {"launch"},
    "train": {"data", "model", "modalities", "launch", "shards.format"},
    "convert": {"model", "modalities"},
    "report": {"train.metrics", "train.exits", "launch.slurm"},
    "preflight": {"launch", "train.engine.ds_config", "model.presets"},
    "evaluation": {"data", "model", "modalities", "shards.format", "shards.index"},
}
TOP = {"cli", "demo", "rehearsal", "generate", "doctor"}
"""These wire rooms together and may import any of them."""


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "_shipped" not in p.parts)


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything the module imports, at any depth of its functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_run_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room in TOP or room == "__init__":
        return
    ours = {
        name.removeprefix("onellm_dist.")
        for name in imports_of(path)
        if name.startswith("onellm_dist.")
    }
    if room in LEAVES:
        assert {name.split(".")[0] for name in ours} <= LEAVES | {"modalities"} - {room}, (
            f"{path} is a leaf"
        )
        return
    allowed = MAY_IMPORT[room] | LEAVES | {room, "__version__"}
    wrong = {
        name for name in ours if not any(name == a or name.startswith(f"{a}.") for a in allowed)
    }
    assert not wrong, f"{path.relative_to(PACKAGE)} may not import {sorted(wrong)}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("deepspeed", ("train/engine/", "doctor.py")),
        ("torch.distributed.fsdp", ("train/engine/",)),
        ("flash_attn", ("model/attention.py", "doctor.py")),
        ("flash_attn_interface", ("model/attention.py", "doctor.py")),
    ],
)
def test_libraries_stay_in_their_room(library: str, homes: tuple[str, ...]) -> None:
    users = [
        str(p.relative_to(PACKAGE))
        for p in modules()
        if any(f"{n}.".startswith(f"{library}.") for n in imports_of(p))
    ]
    assert not [u for u in users if not u.startswith(homes)]


def test_modality_names_stay_in_their_room() -> None:
    from onellm_dist.modalities import all_modalities

    names = set(all_modalities())
    free = ("modalities/", "convert/", "shards/sources/", "rehearsal/", "demo/")
    for path in modules():
        place = str(path.relative_to(PACKAGE))
        if place.startswith(free):
            continue
        literals = {
            n.value
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        assert not literals & names, f"{place} names {sorted(literals & names)}"
