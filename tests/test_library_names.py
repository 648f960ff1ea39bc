"""Names of libraries, of engines and of modalities stay in the rooms that are for them.

An engine, a kernel or a modality is added or replaced in one place only as long as no other file
knows its name. What counts as naming: an import, an identifier, an attribute, a string. Docstrings
and comments may name anything.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest
from package_code import PACKAGE, modules, nodes

from onellm_dist.modalities import all_modalities

pytestmark = pytest.mark.unmeasured
IMPORTS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("train/engine/deepspeed/",),
    "torch.distributed.fsdp": ("train/engine/fsdp/",),
    "flash_attn": ("model/attention.py", "model/kernels/"),
    "flash_attn_interface": ("model/attention.py", "model/kernels/"),
    "webdataset": ("shards/",),
    "pyarrow": ("shards/sources/readers/",),
    "braceexpand": ("shards/format/",),
    "fsspec": ("shards/storage/",),
    "av": ("modalities/io/", "shards/", "testing/integration/"),
    "soundfile": ("modalities/", "shards/sources/", "testing/integration/"),
    "scipy": (
        "modalities/",
        "shards/sources/readers/",
        "testing/ablations/",
        "testing/integration/",
    ),
    "open_clip": ("convert/",),
    "gguf": ("convert/",),
    "accelerate": ("model/", "train/callbacks/"),
    "torch.utils.tensorboard": ("train/",),
    "rich": ("common/", "diagnostics/", "cli/"),
    "typer": ("cli/",),
    "fastapi": ("serving/server/", "serving/chat/"),
    "gradio": ("serving/chat/",),
    "uvicorn": ("serving/server/",),
    "prometheus_client": ("serving/server/",),
}
"""Library -> where it may be imported; elsewhere it is reached through what is there."""
ENGINE_NAMES = re.compile(
    r"deepspeed|\bds_|_ds_|fsdp|fully_shard|\bZeRO(?:\b|-?[123])", re.IGNORECASE
)
ENGINE_ROOM = "train/engine/"
NAMES_AN_ENGINE: dict[str, str] = {
    "config/schema.py": "`engine.name`: the names that a recipe may give, as data",
    "common/resources.py": "`ds_configs/` is a folder of the checkout that users edit",
    "convert/": "checkpoint formats, which other programs write too, have the libraries' names",
    "launch/": "`deepspeed` is also a launcher of ranks, beside torchrun and srun",
    "cli/": "the launcher, as an option and in examples",
    "train/run.py": "the launcher, in the example of the usage message",
    "diagnostics/": "the launcher: whether it is installed, and the file of variables it reads",
    "testing/": "whole runs that are started by the launcher, with its environment",
}
"""Files and folders that name an engine all the same -> why."""
MODALITY_ROOMS = ("modalities/", "convert/", "shards/sources/", "testing/", "evaluation/tasks/")


@cache
def imports_of(name: str) -> set[str]:
    """Dotted names of everything that a module imports, at any depth of its functions."""
    found: set[str] = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def strings_of(name: str) -> Iterator[str]:
    """Every string of a module but the docstrings of modules, classes, functions and fields."""
    docstrings = {
        id(node.value)
        for node in nodes(name)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in nodes(name):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            yield node.value


def identifiers_of(name: str) -> Iterator[str]:
    """Every name, attribute, argument, keyword, class and function of a module."""
    for node in nodes(name):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name


@pytest.mark.parametrize("library", IMPORTS)
def test_a_library_is_imported_in_its_rooms_alone(library: str) -> None:
    outside = [
        name
        for name in modules()
        if not name.startswith(IMPORTS[library])
        and any(f"{imported}.".startswith(f"{library}.") for imported in imports_of(name))
    ]
    assert outside == []


@cache
def engine_names() -> dict[str, set[str]]:
    """File -> what in it names an engine."""
    found: dict[str, set[str]] = {}
    for name in modules():
        texts = [*imports_of(name), *identifiers_of(name), *strings_of(name)]
        named = {text for text in texts if ENGINE_NAMES.search(text)}
        if named:
            found[name] = named
    return found


def test_engines_are_named_in_their_room_alone() -> None:
    rooms = (ENGINE_ROOM, *NAMES_AN_ENGINE)
    assert {name: t for name, t in engine_names().items() if not name.startswith(rooms)} == {}


def test_every_exception_is_still_needed() -> None:
    named = engine_names()
    assert [room for room in NAMES_AN_ENGINE if not any(n.startswith(room) for n in named)] == []


LOADED_BY_NAME = {
    "train/start/planner.py": {"onellm_dist.planner.budgets"},
}
"""File -> modules above it that it loads by name, which import-linter does not see."""
NAMED_NOT_LOADED = {
    "common/plugins.py": "a group of entry points",
    "launch/slurm/programs.py": "programs of job scripts, as commands",
    "testing/": "the command line, as a command",
}
"""File or folder that names a module above it -> as what."""


def layers() -> list[set[str]]:
    """The package's folders as import-linter has them, from the top."""
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    first = text[text.index('name = "Arrows point one way"') :]
    listed = re.findall(r'^    "(.+)",$', first[: first.index("]\n")], re.MULTILINE)
    return [set(re.findall(r"onellm_dist\.(\w+)", line)) for line in listed]


def modules_above(name: str) -> Iterator[str]:
    """Texts of a module that name one of a folder above its own."""
    height = {folder: number for number, line in enumerate(layers()) for folder in line}
    own = height.get(name.partition("/")[0].removesuffix(".py"), -1)
    for text in strings_of(name):
        found = re.fullmatch(r"onellm_dist\.(\w+)[.\w]*(?::[.\w]+)?", text)
        if found and height.get(found[1], own) < own:
            yield text


def test_no_module_loads_one_above_it_by_name_but_the_one_that_is_known() -> None:
    loading = [name for name in modules() if not name.startswith(tuple(NAMED_NOT_LOADED))]
    found = {name: set(modules_above(name)) for name in loading}
    assert {name: above for name, above in found.items() if above} == LOADED_BY_NAME


OTHER_MEANINGS = {"launch/cloud/jobset.py": ["image"]}
"""Words that are not a modality there: Kubernetes' key of a container's image."""


def test_modalities_are_named_in_their_rooms_alone() -> None:
    """Recipes name them too, outside the package."""
    named = {
        name: sorted(set(strings_of(name)) & set(all_modalities()))
        for name in modules()
        if not name.startswith(MODALITY_ROOMS)
    }
    assert {name: found for name, found in named.items() if found} == OTHER_MEANINGS
