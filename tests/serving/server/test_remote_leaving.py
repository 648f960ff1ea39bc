"""Clients that leave, and servers of the LLM that do not answer: no place is kept by either."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection
from itertools import islice
from typing import Any

import pytest
import requests
import served_model as served
import torch
from mock_vllm import Mock, run_mock

from onellm_dist.model.generation.batched import Prompt
from onellm_dist.model.generation.media_cache import Medium
from onellm_dist.serving.server import remote_llm
from onellm_dist.serving.server.jobs import Job, JobQueue
from onellm_dist.serving.server.metrics import ServerMetrics
from onellm_dist.serving.server.remote_llm import EmbeddingsAlone, RemoteAddress, RemoteEngine

KIND = {"Content-Type": "application/json"}
RUNNING = "onellm_running_requests"
WHOLE = served.make_model()


def read_running(address: str) -> float:
    text = requests.get(f"{address}/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(RUNNING)).split()[-1])


def wait_for(address: str, running: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (found := read_running(address)) != running:
        assert time.monotonic() < end, f"{found} requests run"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def mock() -> Mock:
    return Mock(WHOLE.llm)


@contextmanager
def serve(url: str, **settings: Any) -> Iterator[str]:
    model = served.make_model()
    model.llm = EmbeddingsAlone(model.llm)
    with served.serve(model, llm_url=url, max_new_tokens=60, **settings) as address:
        yield address


@pytest.mark.parametrize("protocol", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("whole_events", [0, 3])
@pytest.mark.seconds
def test_the_place_of_a_client_that_left_is_free_within_a_second(
    mock: Mock, monkeypatch: pytest.MonkeyPatch, protocol: str, whole_events: int
) -> None:
    """The other server says nothing more, as one that is busy with others."""
    released = threading.Event()

    def stall(events: Iterator[Any]) -> Iterator[Any]:
        yield from islice(events, whole_events)
        released.wait(30)

    monkeypatch.setattr(mock, "change", stall)
    with run_mock(mock, protocol) as url, serve(url, batch=1) as address:
        try:
            for stream in (True, False):
                body = served.make_body("What is it?", max_tokens=60, stream=stream)
                host, port = address.removeprefix("http://").split(":")
                head = (
                    f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                begun = mock.written
                with socket.create_connection((host, int(port))) as leaving:
                    leaving.sendall(head.encode() + body)
                    wait_for(address, 1, 20)
                    while mock.written < begun + whole_events:
                        time.sleep(0.01)
                wait_for(address, 0, 1)
            monkeypatch.setattr(mock, "change", iter)
            body = served.make_body("What is it?", max_tokens=4)
            answer = requests.post(f"{address}/v1/chat/completions", data=body, headers=KIND)
            assert answer.status_code == 200  # by the one place there is
        finally:
            released.set()


def test_a_server_that_takes_no_connections_is_given_up(
    mock: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_llm, "_CONNECT_SECONDS", 0.3)
    # A backlog that is full: the kernel answers no more handshakes.
    full, *held = (socket.socket() for _ in range(5))
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    for each in held:
        each.setblocking(False)
        each.connect_ex(full.getsockname())

    def connect(_: RemoteAddress, seconds: float) -> HTTPConnection:
        host, port = full.getsockname()
        return HTTPConnection(host, port, timeout=seconds)

    with run_mock(mock) as url, serve(url) as address:
        monkeypatch.setattr(RemoteAddress, "connect", connect)
        body = served.make_body("What is it?", max_tokens=4)
        began = time.monotonic()
        answer = requests.post(f"{address}/v1/chat/completions", data=body, headers=KIND)
        took = time.monotonic() - began
    for each in (full, *held):
        each.close()
    assert answer.status_code == 502 and "no complete answer" in answer.json()["error"]["message"]
    assert took < 10


class AnnouncedLock(AbstractContextManager[None]):
    """A lock that says when somebody waits for it."""

    def __init__(self) -> None:
        self._lock, self.wanted = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        self.wanted.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_an_error_that_cannot_be_sent_ends_no_thread(
    mock: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is a place for a request."""
    events: list[Any] = []

    def refuse(*_: Any) -> Any:
        raise ConnectionRefusedError("no longer there")

    with run_mock(mock) as url:
        queue, address = JobQueue(2), RemoteAddress(url)
        engine = RemoteEngine(served.make_model(), address, [2], queue, ServerMetrics(), 1)
        monkeypatch.setattr(RemoteAddress, "connect", refuse)
        engine.start()
        for send in (refuse, events.append):
            prompt = Prompt([1, 5], max_new_tokens=2)
            queue.put(Job(prompt, (), None, time.monotonic() + 60, send))
        engine.close()
    assert [event.status for event in events] == [502]


def test_nothing_is_done_for_a_client_that_left_while_others_were_encoded(
    mock: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def encode() -> torch.Tensor:
        done.append("encoded")
        return torch.zeros(3, 224, 224)

    with run_mock(mock) as url:
        address, model = RemoteAddress(url), served.make_model()
        queue = JobQueue(2)
        engine = RemoteEngine(model, address, [2], queue, ServerMetrics(), 1)
        connect = RemoteAddress.connect

        def count(self: RemoteAddress, seconds: float) -> HTTPConnection:
            done.append("connected")
            return connect(self, seconds)

        monkeypatch.setattr(RemoteAddress, "connect", count)
        prompt = Prompt([1, 5], [Medium("image", encode)], max_new_tokens=2)
        job = Job(prompt, (), None, time.monotonic() + 60, lambda event: done.append(repr(event)))
        lock = AnnouncedLock()
        monkeypatch.setattr(engine, "_lock", lock)
        with lock:  # another request is being encoded
            lock.wanted.clear()
            engine.start()
            queue.put(job)
            assert lock.wanted.wait(60)
            job.cancel()
        engine.close()
    assert not done
