"""The server, by the openai client, curl and plain connections."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import requests
import served_model as served
from PIL import Image

from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.serving.generate import DecodingOptions, build_prompt, generate
from onellm_dist.serving.media import read_given_files
from onellm_dist.serving.placed_media import place_prompt
from onellm_dist.serving.server.media import to_files

MODEL = served.make_model()
FILES = served.make_files()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served.serve(MODEL, batch=8, max_new_tokens=400) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(client: Any, question: str, media: dict[str, Any], **options: Any) -> Any:
    parts = [served.make_part(name, files) for name, files in media.items()]
    options = {"max_tokens": 12, **options}
    return client.chat.completions.create(
        model="toy", messages=served.make_messages(question, *parts), **options
    )


@pytest.mark.slow
def test_all_modalities_are_answered_as_by_generate(client: Any) -> None:
    answers = {}
    for media in [{name: FILES[name]} for name in FILES] + [FILES, {}]:
        found = ask(client, "What is it?", media)
        text = found.choices[0].message.content
        assert text == served.compute_answer(MODEL, "What is it?", media), list(media)
        answers[tuple(media)] = text
        assert found.usage.completion_tokens <= 12 and found.model == "toy"
        assert found.usage.prompt_tokens > 32 * len(media)
    assert len(set(answers.values())) > 3  # the media decide


@pytest.mark.slow
def test_a_large_picture_takes_as_many_spans_as_in_training() -> None:
    model = served.make_model()
    model.config.spans = {"image": 3}
    model.config.span_positions = "fixed"
    buffer = io.BytesIO()
    Image.effect_noise((448, 224), 80).convert("RGB").save(buffer, "PNG")
    media = {"image": buffer.getvalue()}
    with served.serve(model, max_new_tokens=12) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        found = ask(client, "What is it?", media)
    text = build_prompt("<image>What is it?", "conversation")  # a model with spans has places
    (values,) = read_given_files([to_files("image", media["image"])._replace(most=3)])
    placed = place_prompt(load_toy_tokenizer(), text, [("image", values)], ["image"], chat=False)
    assert len(values) == 3 and found.usage.prompt_tokens == len(placed.ids) + 3 * 32
    wanted = generate(
        model,
        load_toy_tokenizer(),
        text,
        [("image", values)],
        decoding=DecodingOptions(max_new_tokens=12),
    )
    assert found.choices[0].message.content == wanted.text


def test_a_stream_gives_the_same_text_with_usage(client: Any) -> None:
    media = {"image": FILES["image"]}
    whole = ask(client, "What?", media, max_tokens=30)
    events = list(
        ask(
            client,
            "What?",
            media,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [e.choices[0].delta.content or "" for e in events if e.choices]
    assert "".join(texts) == whole.choices[0].message.content and sum(map(bool, texts)) > 3
    assert events[-1].usage == whole.usage
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_seeds_stops_and_probabilities(client: Any) -> None:
    drawn = [
        ask(client, "What?", {}, temperature=1.5, seed=seed, max_tokens=24)
        .choices[0]
        .message.content
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = ask(client, "What?", {}, max_tokens=24)
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = ask(client, "What?", {}, max_tokens=24, stop=[stop])
    assert cut.choices[0].message.content == text.split(stop)[0].strip()
    assert cut.choices[0].finish_reason == "stop"
    found = ask(client, "What?", {}, max_tokens=5, logprobs=True, top_logprobs=3)
    records = found.choices[0].logprobs.content
    assert len(records) == found.usage.completion_tokens == 5
    for record in records:  # greedy: the likeliest was taken
        assert record.token == record.top_logprobs[0].token and len(record.top_logprobs) == 3
        assert record.logprob == record.top_logprobs[0].logprob <= 0
    streamed = list(ask(client, "What?", {}, max_tokens=5, logprobs=True, stream=True))
    tokens = [r for e in streamed if e.choices[0].logprobs for r in e.choices[0].logprobs.content]
    assert [r.token for r in tokens] == [r.token for r in records]


def test_models_health_and_metrics(client: Any, address: str) -> None:
    (model,) = client.models.list()
    assert model.id == "toy" and client.models.retrieve("toy").id == "toy"
    assert "imu" in requests.get(f"{address}/v1/models").json()["data"][0]["modalities"]
    assert requests.get(f"{address}/health").json() == {"status": "ok", "waiting": 0}
    ask(client, "What?", {}, max_tokens=3)
    text = requests.get(f"{address}/metrics").text
    assert 'onellm_requests_total{status="200"}' in text
    assert "onellm_running_requests 0.0" in text and "onellm_completion_tokens_total" in text
    assert requests.get(f"{address}/docs").status_code == 404


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(address: str, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_bytes(served.make_body("What?", max_tokens=5, stream=True))
    done = subprocess.run(
        [
            *("curl", "-sN", f"{address}/v1/chat/completions"),
            *(
                "-H",
                "Content-Type: application/json",
                "--data-binary",
                f"@{tmp_path / 'body.json'}",
            ),
        ],
        capture_output=True,
        check=True,
        text=True,
    )
    events = [line[6:] for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and json.loads(events[0])["choices"][0]["delta"]["role"]


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "valid dictionary"),
        ({"model": "other"}, 404, "no model 'other'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role 'tool'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "no question"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10_000}, 400, "this server allows 400"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 2}, 400, "n is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"top_logprobs": 3}, 400, "needs logprobs"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "positions"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 400, "characters"),
    ],
)
def test_bad_requests_are_refused_in_words(
    address: str, content: Any, status: int, says: str
) -> None:
    if isinstance(content, dict):
        plain = {"model": "toy", "messages": [{"role": "user", "content": "x"}]}
        content = json.dumps({**plain, **content}).encode()
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{address}/v1/chat/completions", data=content, headers=headers)
    assert answer.status_code == status and says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}, "does not fetch"),
        ({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}, "does not fetch"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "does not fetch"),
        ({"type": "image_url", "image_url": {"url": "gopher://x/"}}, "does not fetch"),
        ({"type": "image_url", "image_url": {"url": "http://[::1"}}, "not valid"),
        ({"type": "image_url", "image_url": "/etc/passwd"}, "does not fetch"),
        ({"type": "image", "path": "../../etc/passwd"}, "does not fetch"),
        ({"type": "image", "image": 7}, "is a int"),
        ({"type": "depth", "parts": {"depth": "/etc/passwd", "image": "x"}}, "not base64"),
        ({"type": "depth", "parts": {"depth": served.encode(b"x")}}, "lacks image"),
        ({"type": "imu", "parts": {"../x": served.encode(b"x")}}, "lacks imu"),
        ({"type": "image", "data": served.encode(b"no picture")}, "medium 1 (image)"),
        ({"type": "audio", "data": served.encode(b"no sound")}, "medium 1 (audio)"),
        ({"type": "image", "data": ""}, "medium 1 (image)"),
        ({"type": "image", "url": "data:image/png;base64,eA%3D%3D"}, "cannot be decoded"),
        ({"type": "smell", "data": "x"}, "of type 'smell'"),
        ({**served.make_part("imu", FILES["imu"]), "text": "What <imu>?"}, "says <imu>"),
    ],
)
def test_media_that_may_not_or_cannot_be_read_are_refused(
    address: str, part: dict[str, Any], says: str
) -> None:
    headers = {"Content-Type": "application/json"}
    body = served.make_body(part.get("text", "What?"), part)
    answer = requests.post(f"{address}/v1/chat/completions", data=body, headers=headers)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_keys_sizes_pace_and_content_types() -> None:
    with served.serve(
        MODEL, api_keys=("right", "other"), request_mb=1, requests_per_minute=5, receive_seconds=1.0
    ) as address:
        url = f"{address}/v1/chat/completions"
        body = served.make_body("What?", max_tokens=2)
        kind = {"Content-Type": "application/json"}
        for key in ("", "Bearer wrong", "Bearer", "Basic right", "Bearer r\xe9"):
            headers: dict[str, Any] = {**kind, "Authorization": key.encode("latin-1")}
            if not key:
                del headers["Authorization"]
            assert requests.post(url, data=body, headers=headers).status_code == 401
        assert requests.get(f"{address}/metrics").status_code == 401
        assert requests.get(f"{address}/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        kind["Authorization"] = "Bearer right"
        assert requests.post(url, data=body, headers=kind).status_code == 200
        text = {**kind, "Content-Type": "text/plain"}
        assert requests.post(url, data=body, headers=text).status_code == 415
        assert requests.post(url, data=b" " * (1 << 20) + body, headers=kind).status_code == 413
        assert requests.post(url, data=iter([b" " * 700_000] * 3), headers=kind).status_code == 413
        evil = {**kind, "Host": "evil.example"}
        assert requests.post(url, data=body, headers=evil).status_code == 400
        with connect(address) as slow:  # a body that never ends
            slow.sendall(make_head(url, 100, "Authorization: Bearer right") + b"{")
            slow.settimeout(10)
            assert b" 408 " in slow.recv(4096)
        answer = requests.post(url, data=body, headers=kind)
        assert answer.status_code == 429 and answer.headers["Retry-After"]
        kind["Authorization"] = "Bearer other"  # has a pace of its own
        assert requests.post(url, data=body, headers=kind).status_code == 200
        metrics = requests.get(f"{address}/metrics", headers=kind).text
        wanted = {200: 2, 401: 5, 408: 1, 413: 2, 415: 1, 429: 1}
        for status, count in wanted.items():
            assert f'onellm_requests_total{{status="{status}"}} {count}.0' in metrics


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname or "", parts.port or 0))


def make_head(url: str, length: int, *more: str) -> bytes:
    parts = urlsplit(url)
    lines = [
        f"POST {parts.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def read_metric(address: str, name: str) -> float:
    text = requests.get(f"{address}/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


@pytest.mark.parametrize("stream", [False, True])
def test_the_place_of_a_client_that_left_is_free_within_a_second(
    address: str, stream: bool
) -> None:
    url = f"{address}/v1/chat/completions"
    before = read_metric(address, "onellm_abandoned_requests_total")
    body = served.make_body("What?", max_tokens=400, stream=stream, stop=["never so"])
    with connect(address) as leaving:
        leaving.sendall(make_head(url, len(body)) + body)
        wait_for(lambda: read_metric(address, "onellm_running_requests") == 1)
    left = time.monotonic()
    wait_for(lambda: read_metric(address, "onellm_running_requests") == 0)
    assert time.monotonic() - left < 1
    assert read_metric(address, "onellm_abandoned_requests_total") == before + 1


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.seconds
def test_a_full_queue_and_late_answers() -> None:
    kind = {"Content-Type": "application/json"}
    with served.serve(MODEL, batch=1, queue=1, request_seconds=60) as address:
        url = f"{address}/v1/chat/completions"
        long = served.make_body("What?", max_tokens=400)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(requests.post, url, data=long, headers=kind)
            wait_for(lambda: read_metric(address, "onellm_running_requests") == 1)
            second = pool.submit(requests.post, url, data=long, headers=kind)
            wait_for(lambda: read_metric(address, "onellm_waiting_requests") == 1)
            refused = requests.post(url, data=long, headers=kind)
            assert refused.status_code == 429 and "too many" in refused.json()["error"]["message"]
            assert first.result().status_code == second.result().status_code == 200
    with served.serve(MODEL, request_seconds=0.0) as address:
        url = f"{address}/v1/chat/completions"
        assert requests.post(url, data=long, headers=kind).status_code == 504
        streamed = requests.post(url, data=served.make_body("What?", stream=True), headers=kind)
        assert "took longer" in streamed.text and streamed.text.endswith("data: [DONE]\n\n")


def run_clients(address: str, clients: int, rounds: int) -> int:
    """Ask from many connections at once; returns the number of answers, each of which was right."""
    parts = {
        seed: served.make_part("imu", served.make_array((6, 400), seed=seed)) for seed in range(4)
    }
    wanted: dict[int, str] = {}
    lock = threading.Lock()

    def work(number: int) -> int:
        with requests.Session() as session:
            for asked in range(rounds):
                seed = (number + asked) % len(parts)
                body = served.make_body("What?", parts[seed], max_tokens=8 + 4 * seed)
                answer = session.post(
                    f"{address}/v1/chat/completions",
                    data=body,
                    headers={"Content-Type": "application/json"},
                )
                assert answer.status_code == 200, answer.text
                text = answer.json()["choices"][0]["message"]["content"]
                with lock:
                    assert wanted.setdefault(seed, text) == text
        return rounds

    with ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(work, range(clients)))
    assert len(set(wanted.values())) == len(parts)
    return total


@pytest.mark.slow
def test_clients_at_once_get_their_own_answers(address: str) -> None:
    assert run_clients(address, 16, 2) == 32
