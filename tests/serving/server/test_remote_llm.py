"""An LLM behind another server: a mock of vLLM's completions that computes with transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import requests
import served_model as served
import torch
from mock_vllm import Mock, run_mock

from onellm_dist.common.errors import UsageError
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.serving.generate import build_prompt, encode_prompt
from onellm_dist.serving.server.remote_llm import (
    EmbeddingsAlone,
    RemoteAddress,
    StrippedText,
)
from onellm_dist.serving.server.settings import ServerSettings

KIND = {"Content-Type": "application/json"}
FILES = served.make_files()


WHOLE = served.make_model()


@pytest.fixture(scope="module")
def mock() -> Mock:
    return Mock(WHOLE.llm)


@pytest.fixture(scope="module")
def address(mock: Mock) -> Iterator[str]:
    model = served.make_model()
    model.llm = EmbeddingsAlone(model.llm)
    with (
        run_mock(mock) as url,
        served.serve(model, llm_url=url, batch=4, max_new_tokens=60) as found,
    ):
        yield f"{found}/v1/chat/completions"


def ask(address: str, media: dict[str, Any], **options: Any) -> Any:
    parts = [served.make_part(name, files) for name, files in media.items()]
    body = served.make_body("What is it?", *parts, **{"max_tokens": 12, **options})
    return requests.post(address, data=body, headers=KIND)


@pytest.mark.slow
def test_tensors_and_answers_are_those_of_generation_here(mock: Mock, address: str) -> None:
    ids = encode_prompt(load_toy_tokenizer(), build_prompt("What is it?", "conversation"))
    mixture = {name: FILES[name] for name in ("image", "depth", "fmri")}
    for media in [{name: FILES[name]} for name in FILES] + [mixture, FILES, {}]:
        answer = ask(address, media).json()
        values = {f"{n}_values": v for n, v in served.read_values(media).items()}
        with torch.no_grad():
            wanted = WHOLE.build_inputs(ids, None, values).embeds[0]
        scale = wanted.abs().max()
        torch.testing.assert_close(mock.embeds[-1] / scale, wanted / scale, atol=1e-6, rtol=0)
        text = answer["choices"][0]["message"]["content"]
        assert text == served.compute_answer(WHOLE, "What is it?", media), list(media)
        assert answer["usage"]["prompt_tokens"] == len(wanted)
        assert answer["usage"]["completion_tokens"] == 12


def test_streams_stops_and_what_is_not_supported(address: str) -> None:
    whole = ask(address, {}).json()["choices"][0]
    text = whole["message"]["content"]
    assert whole["finish_reason"] == "length"
    streamed = ask(address, {}, stream=True).text.split("\n\n")
    events = [json.loads(line[6:]) for line in streamed if line.startswith("data: {")]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == text
    stop = text[4:7]
    cut = ask(address, {}, stop=stop).json()["choices"][0]
    assert cut["message"]["content"] == text.split(stop)[0].strip()
    assert cut["finish_reason"] == "stop"
    refused = ask(address, {}, logprobs=True)
    assert refused.status_code == 400 and "logprobs" in refused.json()["error"]["message"]


def test_failures_of_the_other_server_are_said(
    mock: Mock, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mock, "status", 500)
    refused = ask(address, {})
    assert refused.status_code == 502 and "status 500" in refused.json()["error"]["message"]
    monkeypatch.setattr(mock, "status", 200)
    assert ask(address, {}).status_code == 200
    with pytest.raises(UsageError, match="no list of models"):
        RemoteAddress("http://127.0.0.1:1/v1").find_model()
    with pytest.raises(UsageError, match="--llm-url ftp"):
        ServerSettings(llm_url="ftp://x")


def fail(events: Iterator[Any]) -> Iterator[Any]:
    """As vLLM does when its engine dies: an error among the events, after some text."""
    yield from islice(events, 3)
    yield {"error": {"message": "EngineCore encountered an issue", "code": 500}}


def abort(events: Iterator[Any]) -> Iterator[Any]:
    yield from islice(events, 3)
    yield {"choices": [{"text": "", "finish_reason": "abort"}]}


@pytest.mark.parametrize(
    "change", [fail, abort, lambda events: islice(events, 3), lambda _: iter(["odd"])]
)
def test_a_part_of_an_answer_is_not_passed_on_as_whole(
    mock: Mock, address: str, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    monkeypatch.setattr(mock, "change", change)
    refused = ask(address, {})
    assert refused.status_code == 502 and "no complete answer" in refused.json()["error"]["message"]
    streamed = ask(address, {}, stream=True).text
    assert "no complete answer" in streamed and '"finish_reason": "' not in streamed


def test_a_server_with_another_llm_is_refused(mock: Mock) -> None:
    with run_mock(mock) as url:
        assert RemoteAddress(url).find_model() == "llm"
        with pytest.raises(UsageError, match=r"serves llm[^$]*other was asked for"):
            RemoteAddress(url, "other").find_model()


@pytest.mark.seconds
def test_blanks_around_an_answer_are_left_out() -> None:
    text = StrippedText()
    assert [text.add(piece) for piece in (" ", "a ", "", " b", "\n", " ")] == [
        *("", "a", "", "  b", "", "")
    ]
