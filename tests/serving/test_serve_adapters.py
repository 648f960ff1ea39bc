"""`onellm serve` with the folder of an adapter: it answers as the adapted model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import served_model as served
from adapter_folders import save_adapter, save_base
from fastapi import FastAPI
from starlette.testclient import TestClient

from onellm_dist.model.presets import load_model
from onellm_dist.serving.server import run
from onellm_dist.serving.server.settings import ServerSettings


@pytest.mark.slow
def test_a_served_adapter_answers_as_the_model_with_the_adapter_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    adapted = save_adapter(tmp_path / "adapter", base, seed=1)
    answers: list[str] = []

    def ask(app: FastAPI, *_: Any) -> None:
        body = served.make_body("What is it?", served.make_part("imu", FILE), max_tokens=12)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            found = client.post("/v1/chat/completions", content=body, headers=JSON)
        assert found.status_code == 200, found.text
        answers.append(found.json()["choices"][0]["message"]["content"])

    monkeypatch.setattr(run, "run", ask)
    for folder in (tmp_path / "adapter", base):
        run.serve(folder, ServerSettings(name="toy", port=0, readers=1))
    plain: Any
    plain, _ = load_model(path=base, preset=None, seed=0)
    media = {"imu": FILE}
    expected = [
        served.compute_answer(model, "What is it?", media) for model in (adapted, plain.eval())
    ]
    assert answers == expected
    assert answers[0] != answers[1], "the adapter changes the answer"


JSON = {"content-type": "application/json"}
FILE = served.make_files()["imu"]
