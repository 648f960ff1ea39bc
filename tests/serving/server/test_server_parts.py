"""The parts of the server: texts that come token by token, the queue, the engine, fetching."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import served_model as served
import torch
from forked_python import get_programs
from hypothesis import example, given
from hypothesis import strategies as st

from onellm_dist.common.errors import MachineError, OneLLMError, UsageError
from onellm_dist.model import OneLLMProcessor
from onellm_dist.model.generation.batched import Prompt
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.serving.answer_text import AnswerText
from onellm_dist.serving.server import run
from onellm_dist.serving.server.engine import AnswerEngine
from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.jobs import Ending, Job, JobQueue, Piece, QueueFullError
from onellm_dist.serving.server.limits import Pace, RequestLimits
from onellm_dist.serving.server.metrics import ServerMetrics
from onellm_dist.serving.server.remote_llm import RemoteAddress
from onellm_dist.serving.server.settings import ServerSettings

KIND = {"Content-Type": "application/json"}


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(tokens).decode(errors="replace")


@given(
    st.text(max_size=30),
    st.lists(st.text(min_size=1, max_size=4), max_size=3),
)
@pytest.mark.seconds
def test_what_is_shown_is_the_answer_before_the_first_stop(text: str, stops: list[str]) -> None:
    answer = AnswerText(Bytes(), stops)
    shown = [answer.add(token) for token in text.encode()]
    shown.append(answer.finish())
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert answer.stopped == bool(ends)
    # The stop that is complete first counts: a longer one may have begun before it.
    wanted = next(
        (
            text[: min(text[:end].find(s) for s in stops if s in text[:end])]
            for end in range(len(text) + 1)
            if any(s in text[:end] for s in stops)
        ),
        text,
    )
    assert "".join(shown) == wanted.strip() == answer.text


def make_job(tokens: int, **options: Any) -> tuple[Job, list[Any]]:
    events: list[Any] = []
    prompt = Prompt([1] * tokens, max_new_tokens=3)
    values = {"stops": (), "top_logprobs": None, "deadline": time.monotonic() + 60, **options}
    return Job(prompt=values.pop("prompt", prompt), send=events.append, **values), events


def test_the_queue_keeps_the_first_and_groups_by_length() -> None:
    queue = JobQueue(6)
    jobs = [make_job(tokens)[0] for tokens in (50, 5, 49, 7, 51, 6)]
    for job in jobs:
        queue.put(job)
    with pytest.raises(QueueFullError):
        queue.put(make_job(1)[0])
    assert [len(job.prompt.ids) for job in queue.take(3)] == [50, 49, 51]
    queue.discard(jobs[3])
    queue.close()
    with pytest.raises(QueueFullError):
        queue.put(make_job(1)[0])
    assert [len(job.prompt.ids) for job in queue.take(3)] == [5, 6] and queue.take(3) == []


def test_a_request_that_fails_its_batch_fails_alone() -> None:
    tokenizer = load_toy_tokenizer()
    queue = JobQueue(9)
    engine = AnswerEngine(served.make_model(), tokenizer, [2], queue, ServerMetrics(), 9)
    bad, bad_events = make_job(1, prompt=Prompt([1, 10**6]))
    gone, gone_events = make_job(3)
    gone.cancel()
    late, late_events = make_job(3, deadline=0.0)
    good, good_events = make_job(4)
    for job in (bad, gone, late, good):
        queue.put(job)
    engine.start()
    engine.close()
    (error,) = bad_events
    assert isinstance(error, RequestError) and "token 1000000" in error.message
    assert gone_events == [] and late_events[0].status == 504
    assert isinstance(good_events[-1], Ending) and good_events[-1].tokens == 3
    assert all(isinstance(event, Piece) for event in good_events[:-1])


def test_faults_of_the_machine_are_not_the_clients() -> None:
    fault = RequestError.from_error(MachineError("no memory", "it is full", "try again"))
    assert fault.status == 503 and fault.headers["Retry-After"]
    assert RequestError.from_error(UsageError("a", "b", "c")).status == 400
    fault = RequestError.from_error(OneLLMError("no numbers", "none can be drawn", "use fp32"))
    assert fault.status == 500 and fault.kind == "server_error"


def test_llm_and_encoder_share_the_processors_where_both_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer, before = served.make_model(), load_toy_tokenizer(), torch.get_num_threads()
    adapters: Any = SimpleNamespace(names=("photos",))

    def count_threads(beside: Any = None, **settings: Any) -> int:
        torch.set_num_threads(1)
        chosen = ServerSettings(name="toy", port=0, readers=1, **settings)
        service, _, _ = run.build_service(model, tokenizer, chosen, adapters=beside)
        service.media.close()
        return torch.get_num_threads()

    monkeypatch.setattr(run, "count_cpus", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(RemoteAddress, "find_model", lambda _: "llm")
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert count_threads() == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert count_threads() == 4
        # The engine encodes by itself, or the LLM computes elsewhere.
        assert count_threads(adapters) == count_threads(llm_url="http://127.0.0.1:1/v1") == 1
    finally:
        torch.set_num_threads(before)


def test_the_pace_of_clients() -> None:
    pace = Pace(2)
    assert [pace.take("a", 0), pace.take("a", 0), pace.take("a", 1), pace.take("b", 1)] == [
        *(True, True, False, True)
    ]
    assert pace.take("a", 31) and not pace.take("a", 32)
    assert all(Pace(0).take("a") for _ in range(9))


def test_settings_that_would_be_open_to_all_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--host 0\.0\.0\.0 without a key"):
        ServerSettings(host="0.0.0.0")
    with pytest.raises(UsageError, match="an API key is empty"):
        ServerSettings(api_keys=(" ",))
    with pytest.raises(UsageError, match="--format odd"):
        ServerSettings(prompt_format="odd")
    assert not ServerSettings(host="0.0.0.0", api_keys=("x",)).is_loopback


@contextmanager
def run_file_server(data: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_urls_where_allowed_and_readers_that_were_killed() -> None:
    import psutil

    model = served.make_model()
    picture = served.make_picture(0)
    with run_file_server(picture) as host, served.serve(model, url_hosts=(host,)) as address:
        url = f"{address}/v1/chat/completions"
        part = {"type": "image_url", "image_url": {"url": f"http://{host}/x.png"}}
        fetched = requests.post(
            url, data=served.make_body("What?", part, max_tokens=8), headers=KIND
        )
        part = served.make_part("image", picture)
        sent = requests.post(url, data=served.make_body("What?", part, max_tokens=8), headers=KIND)
        assert fetched.status_code == sent.status_code == 200
        assert fetched.json()["choices"] == sent.json()["choices"]
        readers = [
            child
            for child in psutil.Process().children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        assert readers
        for reader in readers:
            reader.kill()
            reader.wait()
        other = served.make_picture(1)  # the first is kept: no process would decode it again
        part = served.make_part("image", other)
        body = served.make_body("What?", part, max_tokens=8)
        after = requests.post(url, data=body, headers=KIND)
        assert after.status_code == 200
        (choice,) = after.json()["choices"]
        wanted = served.compute_answer(model, "What?", {"image": other}, tokens=8)
        assert choice["message"]["content"] == wanted


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served.serve(served.make_model(), max_new_tokens=4) as found:
        yield found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "input_audio", "onellm", "imu", "x"])},
    optional={
        name: JSON | st.sampled_from(["", "eA==", "../../etc/passwd", "file:///etc/passwd"])
        for name in (
            "text",
            "image",
            "image_url",
            "input_audio",
            "modality",
            "data",
            "parts",
            "url",
        )
    },
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "assistant"]) | JSON,
        "content": st.text(max_size=20) | st.lists(PART, max_size=3) | JSON,
    }
)
OPTIONS = (
    *("max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"),
    *("logprobs", "top_logprobs", "n", "tools", "unknown"),
)
PLAIN = {"model": "toy", "messages": [{"role": "user", "content": "x"}]}
REQUEST = st.fixed_dictionaries(
    {"model": st.just("toy"), "messages": st.lists(MESSAGE, max_size=3) | JSON},
    optional=dict.fromkeys(OPTIONS, JSON),
)


def check_fuzzed(address: str, content: bytes) -> None:
    answer = requests.post(f"{address}/v1/chat/completions", data=content, headers=KIND)
    assert answer.status_code in (200, 400, 404), answer.text
    assert "Traceback" not in answer.text and "root:" not in answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


@given(content=REQUEST)
@example(content={**PLAIN, "temperature": 1e-40})
@example(content={**PLAIN, "temperature": 5e-324})
@example(content={**PLAIN, "temperature": 10, "top_p": 5e-324})
@pytest.mark.seconds
def test_fuzzed_requests_are_answered_or_refused(address: str, content: Any) -> None:
    check_fuzzed(address, json.dumps(content).encode())


@given(
    content=st.binary(max_size=60) | JSON.map(lambda value: repr(value).encode("utf-8", "replace"))
)
@pytest.mark.seconds
def test_fuzzed_bodies_are_refused(address: str, content: bytes) -> None:
    check_fuzzed(address, content)


@pytest.mark.slow
def test_a_server_that_is_asked_to_end_answers_what_it_accepted(tmp_path: Path) -> None:
    model = served.make_model()
    model.save_pretrained(tmp_path / "toy")
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(tmp_path / "toy")
    command = [
        *(str(get_programs() / "onellm"), "serve", str(tmp_path / "toy"), "--port", "0"),
        *("--batch", "4", "--readers", "1"),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("serving "))
            address = line.split(" on ")[1].strip()
            count = 12

            def ask(number: int) -> Any:
                body = served.make_body(
                    "What?", max_tokens=200, stream=number % 2 == 0, seed=number
                )
                return requests.post(f"{address}/chat/completions", data=body, headers=KIND)

            with ThreadPoolExecutor(count) as pool:
                answers = [pool.submit(ask, number) for number in range(count)]
                while count_accepted(address) < count:
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                found = [answer.result() for answer in answers]
            assert process.wait(30) == 0
        finally:
            process.kill()
    for answer in found:
        assert answer.status_code == 200
        whole = answer.text.endswith("[DONE]\n\n") if "data:" in answer.text else answer.json()
        assert whole and "error" not in answer.text[:20]


def count_accepted(address: str) -> float:
    text = requests.get(f"{address.removesuffix('/v1')}/metrics").text
    names = ("onellm_running_requests", "onellm_waiting_requests")
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(names))


def test_the_largest_request_fits_in_the_memory_for_all() -> None:
    settings = ServerSettings(request_mb=3, bodies_mb=1)
    answered: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        answered.append(len(message["body"]))

    async def post(size: int) -> int:
        sent: list[Any] = []
        chunks = [b"x" * (size // 2), b"x" * (size - size // 2)]

        async def receive() -> Any:
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "path": "/", "method": "POST", "client": None, "headers": headers}
        await limits(scope, receive, send)
        return sent[0]["status"] if sent else 200

    limits = RequestLimits(app, settings, ServerMetrics())
    assert asyncio.run(post(3 << 20)) == 200 and answered == [3 << 20]
    assert asyncio.run(post((3 << 20) + 1)) == 413
