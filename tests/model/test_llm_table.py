"""The table of LLM families in the docs, and that LLMs learn nothing from fresh random tokens."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_families import tiny_config
from test_llm_check import make_model, make_pack

ROOT = Path(__file__).parents[2]
WORDS = 97
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["stablelm", "mistral", "gpt_oss", "mamba", "falcon"])
def test_nothing_can_be_learned_from_fresh_random_tokens(family: str) -> None:
    """An LLM that sees the tokens it is to predict would soon be better than chance."""
    torch.manual_seed(0)
    model = make_model(tiny_config(family))
    with torch.no_grad():
        for parameter in model.llm.parameters():
            parameter.mul_(0.3)
    optimizer = torch.optim.AdamW(model.llm.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        texts = [torch.randint(3, WORDS, (n,)) for n in (24, 9, 17)]
        out = model(packed=make_pack(texts))
        out.loss.div(len(out.nll)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.nll.mean()))
    entropy = math.log(WORDS - 3)
    assert entropy - 0.05 < sum(losses[-20:]) / 20 < entropy + 0.5
