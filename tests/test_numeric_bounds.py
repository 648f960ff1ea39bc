"""Every numeric bound of the tests of 0.1.0 stands in the tests of today, and none is looser.

`fixtures/numeric_bounds/0.1.0.json` lists them: tolerances by keyword (`rel`, `atol`), comparisons
with floats, and constants (`=`), with the function or constant that has them now, and its name in
0.1.0 where that was another. One more is not in it: a checkpoint of over 1 MB, which the smaller
model of today's test does not have. Whoever makes a bound stricter changes the list.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.unmeasured
TESTS = Path(__file__).parent
RECORDED = json.loads((TESTS / "fixtures/numeric_bounds/0.1.0.json").read_text(encoding="utf-8"))
KEYWORDS = ("rel", "abs", "atol", "rtol", "tol", "delta")
COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
Bound = tuple[str, Any]


def read_number(node: ast.AST) -> int | float | None:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def list_bounds(function: ast.AST) -> Iterator[Bound]:
    """Tolerances that are passed, and floats that are compared with."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS:
                    number = read_number(keyword.value)
                    yield keyword.arg, ast.unparse(keyword.value) if number is None else number
        if isinstance(node, ast.Compare):
            left: ast.AST = node.left
            for comparison, right in zip(node.ops, node.comparators, strict=True):
                sign = COMPARISONS.get(type(comparison))
                if sign and isinstance(value := read_number(right), float):
                    yield sign, value
                if sign and isinstance(value := read_number(left), float):
                    yield f"{sign} (left)", value
                left = right


def list_constants(statement: ast.stmt) -> Iterator[tuple[str, Bound]]:
    """The floats that a module names: `LOSS, UPDATE = 5e-3, 2e-2`."""
    if not isinstance(statement, ast.Assign):
        return
    for target in statement.targets:
        several = isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple)
        names = target.elts if several and isinstance(target, ast.Tuple) else [target]
        values = statement.value.elts if isinstance(statement.value, ast.Tuple) else []
        for name, value in zip(names, values if several else [statement.value], strict=False):
            if isinstance(name, ast.Name) and isinstance(number := read_number(value), float):
                yield name.id, ("=", number)


@cache
def read_bounds(file: str) -> dict[str, Counter[Bound]]:
    """Function or constant of a file to its bounds."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    found: dict[str, Counter[Bound]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, Counter()).update(list_bounds(node))
    for statement in tree.body:
        for name, bound in list_constants(statement):
            found.setdefault(name, Counter())[bound] += 1
    return found


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda one: f"{one['files'][0]}-{one['name']}")
def test_a_bound_of_0_1_0_is_not_looser(recorded: dict[str, Any]) -> None:
    known = Counter[Bound]()
    for file in recorded["files"]:
        known += read_bounds(file).get(recorded["name"], Counter())
    wanted = Counter((kind, value) for kind, many in recorded["bounds"].items() for value in many)
    assert not wanted - known, f"{recorded['name']} in {recorded['files']}"


def test_all_bounds_of_0_1_0_are_listed() -> None:
    assert sum(len(many) for one in RECORDED for many in one["bounds"].values()) == 227
