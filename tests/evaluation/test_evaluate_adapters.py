"""`onellm evaluate` with the folder of an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_folders import save_adapter, save_base

from onellm_dist.common.errors import UsageError
from onellm_dist.evaluation.answer_folder import read_answers
from onellm_dist.evaluation.evaluate import (
    EvaluationOptions,
    evaluate_folder,
    evaluate_model,
)
from onellm_dist.evaluation.loading import identify_model
from onellm_dist.model.adapters.adapter_set import NamedAdapter
from onellm_dist.model.adapters.folder import BASE
from onellm_dist.model.presets import load_toy_tokenizer

pytest_plugins = ("benchmark_fixtures",)
TASK = "mme"
OPTIONS = EvaluationOptions(format="raw", limit=4)


@pytest.mark.slow
def test_an_adapter_is_evaluated_as_the_model_with_the_adapter_beside(
    tmp_path: Path, benchmark_data: Callable[[str], Path]
) -> None:
    data = benchmark_data(TASK)
    base = save_base(tmp_path / "base")
    adapted = save_adapter(tmp_path / "adapter", base, seed=1)
    given = [TASK], data, tmp_path / "beside", OPTIONS
    evaluate_model(adapted, load_toy_tokenizer(), *given, identity="beside")
    answers = {"beside": read_answers(tmp_path / "beside" / TASK)}
    for name in ("adapter", "base"):
        out = tmp_path / f"out-{name}"
        evaluate_folder(tmp_path / name, [TASK], data, out, OPTIONS, None)
        answers[name] = read_answers(out / TASK)
    texts = {
        name: {key: answer.answer for key, answer in found.items()}
        for name, found in answers.items()
    }
    assert len(texts["base"]) == 4
    assert texts["adapter"] == texts["beside"] != texts["base"]
    # Answers of another adapter, or over another base, are not mixed in.
    save_adapter(tmp_path / "second", base, seed=2)
    with pytest.raises(UsageError, match="another"):
        evaluate_folder(tmp_path / "second", [TASK], data, tmp_path / "out-adapter", OPTIONS, None)
    # Side by side, each answers into a folder of its own as it does alone, and resumes there.
    named = [NamedAdapter(name, tmp_path / name) for name in ("second", "adapter")]
    for _ in range(2):
        said = evaluate_folder(base, [TASK], data, tmp_path / "out", OPTIONS, None, named)
    assert said.startswith("rank 0, second: 0 questions answered")
    found = {a.name: read_answers(tmp_path / "out" / a.name / TASK) for a in named}
    assert {key: a.answer for key, a in found["adapter"].items()} == texts["beside"]
    assert {key: a.answer for key, a in found["second"].items()} != texts["beside"]


def test_the_identity_of_an_adapter_is_that_of_its_base_too(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    for path in (base / "config.json", adapter / "adapter_config.json"):
        path.write_text("{}")
    (adapter / BASE).write_text(json.dumps({"path": str(base)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"factors")
    found = []
    for weights in (b"one", b"two", b"one"):
        (base / "model.safetensors").write_bytes(weights)
        found.append(identify_model(adapter))
    assert found[0] == found[2] != found[1]
