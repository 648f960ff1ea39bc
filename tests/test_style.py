"""Bounds on the shape of the code: length of files and functions, docstrings, names used once."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_code import modules, nodes, parse

pytestmark = pytest.mark.unmeasured
ROOT = Path(__file__).parents[1]
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
DOCUMENTED = 0.95
Function = ast.FunctionDef | ast.AsyncFunctionDef
LEANING = re.compile(
    r"(?:The same|As|Those|These|Its|Their|They|It|And|Both|Trainable ones|The others)\b(?!-)"
    r"|(?:What|Whether|Where|When|Why|How|With|From|By|Of) (?:it|its|they|their|them|those|these)\b"
    r"|(?:All|Some|Each|None|Most|Share|Pixels|Digest|Bytes) of (?:it|them|these|those)\b"
    r"|That of\b|(?:In|On) [^.]{1,20}: the same\b|The question's\."
)
"""How a docstring begins that says nothing without the line above it."""
STANDING = {
    "data/pair_text.py": "Both texts of a preference sample, end to end.",
}
"""Docstrings that begin so, and name everything they are about."""


def public_functions() -> Iterator[tuple[str, bool]]:
    """Name of each public function or method, and whether it says what it does.

    A method that overrides one of a base class of the package keeps the base's docstring, as
    `inspect.getdoc` does; so does a property's setter.
    """
    documented: dict[str, set[str]] = defaultdict(set)
    for name in modules():
        for node in nodes(name):
            if isinstance(node, ast.ClassDef):
                documented[node.name] |= {
                    f.name for f in node.body if isinstance(f, Function) and ast.get_docstring(f)
                }
    parents = {
        node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
        for name in modules()
        for node in nodes(name)
        if isinstance(node, ast.ClassDef)
    }

    def is_inherited(owner: str, name: str) -> bool:
        return any(
            name in documented[parent] or (parent in parents and is_inherited(parent, name))
            for parent in parents.get(owner, ())
        )

    for path in modules():
        for node in parse(path).body:
            if isinstance(node, Function) and not node.name.startswith("_"):
                yield f"{path}:{node.name}", bool(ast.get_docstring(node))
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for method in node.body:
                    if isinstance(method, Function) and not method.name.startswith("_"):
                        said = bool(ast.get_docstring(method)) or is_inherited(
                            node.name, method.name
                        )
                        yield f"{path}:{node.name}.{method.name}", said


def test_no_file_is_longer_than_400_lines() -> None:
    long = {
        name: lines
        for name, path in modules().items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert not long


def test_no_function_is_longer_than_60_lines() -> None:
    long = {
        f"{path}:{node.name}": lines
        for path in modules()
        for node in nodes(path)
        if isinstance(node, Function)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert not long


def test_public_functions_say_what_they_do() -> None:
    found = dict(public_functions())
    silent = sorted(name for name, said in found.items() if not said)
    assert len(silent) <= (1 - DOCUMENTED) * len(found), silent


def docstrings() -> Iterator[tuple[str, int, str]]:
    """File, line and text of each docstring: of functions, classes, and of the names above them."""
    for path in modules():
        for node in nodes(path):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                text = node.value.value
                if isinstance(text, str):
                    yield path, node.lineno, text


def test_a_docstring_says_something_alone() -> None:
    leaning = [
        f"{path}:{line}: {text[:80]}"
        for path, line, text in docstrings()
        if LEANING.match(text) and STANDING.get(path) != text
    ]
    assert not leaning, "\n".join(leaning)


def test_docstrings_that_stand_alone_are_there() -> None:
    found = {(path, text) for path, _, text in docstrings()}
    assert STANDING.items() <= found


def test_a_class_name_is_used_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in modules():
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_a_file_of_tests_has_a_name_of_its_own() -> None:
    """pytest imports them by name, in one process."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert [n for n, count in names.items() if count > 1 and n != "__init__.py"] == []


def test_one_attribute_a_line() -> None:
    several = [
        f"{path}:{node.lineno}"
        for path in modules()
        for node in nodes(path)
        if isinstance(node, ast.Assign)
        and any(
            isinstance(target, ast.Tuple)
            and isinstance(node.value, ast.Tuple)
            and any(isinstance(e, ast.Attribute) for e in target.elts)
            for target in node.targets
        )
    ]
    assert not several


@pytest.mark.parametrize("name", ["onellm_dist", "onellm_dist.cli"])
def test_importing_loads_no_heavy_library(name: str) -> None:
    import subprocess
    import sys

    code = f"import {name}, sys; print({{'torch', 'transformers', 'deepspeed'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"
