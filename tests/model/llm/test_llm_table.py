"""The table of LLM families in the docs is what the check finds."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
FEW = [
    "llama",
    "stablelm",
    "mistral",
    "gemma2",
    "gpt_oss",
    "mamba",
    "falcon",
    "olmo_hybrid",
    "bert",
]


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "llm_table.py"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FEW)
def test_the_page_says_what_the_check_finds(table: dict[str, Any], family: str) -> None:
    page = (ROOT / "docs" / "reference" / "llms.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{family}` |"))
    assert row == table["build_table"]([family]).splitlines()[-1]


@pytest.mark.soak
def test_the_page_says_what_the_check_finds_of_every_family(table: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "reference" / "llms.md").read_text(encoding="utf-8")
    known = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    for family in table["list_families"]():
        assert family in known
        name, way, _ = table["check_family"](family)
        assert f"| `{name}` | {way} |" in page
