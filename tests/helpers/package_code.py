"""The code of the package as syntax trees: each file is read, parsed and walked once a process."""

from __future__ import annotations

import ast
import gc
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "onellm_dist"


@cache
def modules() -> dict[str, Path]:
    """Path inside the package -> file; copies of other folders that ship with it are left out."""
    return {
        str(path.relative_to(PACKAGE)): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if "_shipped" not in path.parts
    }


@cache
def parse(name: str) -> ast.Module:
    text = modules()[name].read_text(encoding="utf-8")
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        gc.enable()
        gc.freeze()  # the trees stay; collections that walk them all would take most of the time


@cache
def nodes(name: str) -> tuple[ast.AST, ...]:
    """Every node of a module, as `ast.walk` gives them."""
    return tuple(ast.walk(parse(name)))
