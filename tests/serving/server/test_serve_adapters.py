"""`onellm serve` and `onellm generate` with adapters: merged, and several side by side."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import served_model as served
from adapter_folders import save_adapter, save_base
from fastapi import FastAPI
from starlette.testclient import TestClient

from onellm_dist.cli import main as cli
from onellm_dist.common.errors import UsageError
from onellm_dist.model.adapters.adapter_set import AdapterSet, NamedAdapter
from onellm_dist.model.generation.batched import Prompt
from onellm_dist.model.generation.media_cache import MediaCache
from onellm_dist.model.presets import load_model
from onellm_dist.serving.server import engine, run
from onellm_dist.serving.server.jobs import Job, JobQueue
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


@pytest.mark.slow
def test_each_request_is_answered_by_the_adapter_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests for the base and two adapters wait together, about the same medium."""
    caches: list[MediaCache] = []

    def make_cache() -> MediaCache:
        caches.append(MediaCache())
        return caches[-1]

    monkeypatch.setattr(engine, "MediaCache", make_cache)
    base, media = save_base(tmp_path / "base"), {"imu": FILE}
    beside = {
        name: save_adapter(tmp_path / name, base, seed=seed)
        for seed, name in enumerate(("one", "two"), start=1)
    }
    plain: Any
    plain, _ = load_model(path=base, preset=None, seed=0)
    plain.eval()
    questions = ["What is it?", "Where?", "Who was it that moved?"]
    expected = {
        (name, question): served.compute_answer(model, question, media)
        for name, model in {"toy": plain, **beside}.items()
        for question in questions
    }
    loaded = AdapterSet(plain, [NamedAdapter(name, tmp_path / name) for name in beside])

    def ask(url: str, name: str, question: str) -> requests.Response:
        part = served.make_part("imu", FILE)
        body = served.make_body(question, part, max_tokens=12, model=name)
        return requests.post(f"{url}/v1/chat/completions", data=body, headers=JSON, timeout=60)

    with served.serve(plain, adapters=loaded) as url, ThreadPoolExecutor(18) as pool:
        asked = [(name, question) for question in questions for name in ("toy", "one", "two")] * 2
        found = list(pool.map(lambda given: ask(url, *given), asked))
        models = requests.get(f"{url}/v1/models", timeout=60).json()["data"]
        one = requests.get(f"{url}/v1/models/one", timeout=60)
        wrong = ask(url, "three", "Who?")
    for given, response in zip(asked, found, strict=True):
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["choices"][0]["message"]["content"] == expected[given], given
        assert answer["model"] == given[0]
    assert len({expected[name, questions[0]] for name in ("toy", "one", "two")}) == 3
    (cache,) = caches  # one bound for all, and nothing of one adapter given to another
    assert (cache.encoded, cache.reused) == (3, len(asked) - 3)
    assert [(m["id"], m.get("parent")) for m in models] == [
        *(("toy", None), ("one", "toy"), ("two", "toy"))
    ]
    assert one.json() == models[1]
    assert wrong.status_code == 404 and "this server has 'toy', 'one', 'two'" in wrong.text


def test_the_queue_does_not_mix_adapters() -> None:
    queue = JobQueue(9)
    for adapter, tokens in (("a", 5), ("b", 5), ("", 5), ("b", 9), ("a", 6), ("a", 50)):
        prompt = Prompt([1] * tokens, max_new_tokens=3)
        queue.put(Job(prompt, (), None, time.monotonic() + 60, print, adapter))
    queue.close()
    taken = [
        [(job.adapter, len(job.prompt.ids)) for job in jobs]
        for jobs in iter(lambda: queue.take(2), [])
    ]
    assert taken == [[("a", 5), ("a", 6)], [("b", 5), ("b", 9)], [("", 5)], [("a", 50)]]


def test_settings_that_adapters_cannot_have_are_refused() -> None:
    with pytest.raises(UsageError, match="one has the name of the model"):
        ServerSettings(name="one", adapters=("one",))
    with pytest.raises(UsageError, match="--adapter together with --llm-url"):
        ServerSettings(adapters=("one",), llm_url="http://127.0.0.1:8001/v1")


@pytest.mark.slow
def test_generate_answers_with_every_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base")
    beside = {name: save_adapter(tmp_path / name, base, seed=len(name)) for name in ("a", "b.2")}
    expected = {name: served.compute_answer(model, "Who?", {}) for name, model in beside.items()}
    options = [f"--adapter={name}={tmp_path / name}" for name in beside]
    command = ["generate", str(base), "Who?", "--max-new-tokens=12", *options]
    for line in (command, [*command, "--json"]):
        with pytest.raises(SystemExit) as ended:
            cli(line)
        assert not ended.value.code
    said = capsys.readouterr().out
    assert said.startswith("".join(f"{name}: {text}\n" for name, text in expected.items()))
    answers = [json.loads(text) for text in said.splitlines()[-2:]]
    assert {answer["adapter"]: answer["answer"] for answer in answers} == expected
    assert len(set(expected.values())) == 2


JSON = {"content-type": "application/json"}
FILE = served.make_files()["imu"]
