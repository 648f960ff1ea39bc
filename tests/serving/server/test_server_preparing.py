"""Requests that are being prepared: how many, for how long, for whom, and where media stand."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import served_model as served

from onellm_dist.data.text import HEADER
from onellm_dist.serving.generate import build_prompt
from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.preparing import PreparationGate

MODEL = served.make_model()
KIND = {"Content-Type": "application/json"}
FIRST, SECOND = served.make_picture(1), served.make_picture(2)


async def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_requests_are_prepared_in_turn_and_within_their_time() -> None:
    async def check() -> None:
        gate = PreparationGate(at_once=1, waiting=2, seconds=1.0)
        running: list[str] = []

        async def work(name: str, seconds: float) -> str:
            running.append(name)
            await asyncio.sleep(seconds)
            return name

        first = asyncio.create_task(gate.run(work("a", 60)))
        await asyncio.sleep(0.5)
        second = asyncio.create_task(gate.run(work("b", 60)))
        await wait_for(lambda: gate.waiting == 1 and running == ["a"])
        late = asyncio.create_task(gate.run(work("c", 0)))
        await wait_for(lambda: gate.waiting == 2)
        with pytest.raises(RequestError, match="too many requests wait") as refused:
            await gate.run(work("d", 0))
        assert refused.value.status == 429 and refused.value.headers["Retry-After"]
        with pytest.raises(RequestError, match=r"media .* within 1 s") as slow:
            await first
        assert slow.value.status == 504
        with pytest.raises(RequestError, match=r"waited 1 s") as busy:
            await late
        assert busy.value.status == 429 and running == ["a", "b"]
        second.cancel()  # its client left
        await asyncio.wait([second])
        assert await gate.run(work("e", 0)) == "e" and gate.waiting == 0

    asyncio.run(check())


class SlowHost:
    """A host of files; those called slow come once they are released."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.asked = 0
        self.data = b""

    @contextmanager
    def run(self) -> Iterator[str]:
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked += 1
                self.send_response(200)
                self.end_headers()
                if "slow" in self.path:
                    host.release.wait(20)
                self.wfile.write(host.data)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            self.release.set()
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture(scope="module")
def host() -> SlowHost:
    return SlowHost()


@pytest.fixture(scope="module")
def hostname(host: SlowHost) -> Iterator[str]:
    with host.run() as name:
        yield name


@pytest.fixture(scope="module")
def address(hostname: str) -> Iterator[str]:
    with served.serve(
        MODEL,
        warm_up=True,  # else the first medium waits for the process that decodes it
        url_hosts=(hostname,),
        preparing=1,
        queue=1,
        prepare_seconds=2.0,
        request_mb=1,
        bodies_mb=1,
        max_new_tokens=12,
    ) as found:
        yield found


def make_url_part(host: str, name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"http://{host}/{name}.png"}}


def post(address: str, body: bytes) -> Any:
    return requests.post(f"{address}/v1/chat/completions", data=body, headers=KIND)


def read_metric(address: str, name: str) -> float:
    text = requests.get(f"{address}/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.seconds
def test_a_client_that_leaves_while_its_media_come_frees_its_place(
    address: str, host: SlowHost, hostname: str
) -> None:
    host.release.clear()
    host.data = FIRST
    asked, gone = host.asked, read_metric(address, "onellm_abandoned_requests_total")
    body = served.make_body("What?", make_url_part(hostname, "slow"))
    parts = urlsplit(address)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((parts.hostname or "", parts.port or 0)) as leaving:
        leaving.sendall(head.encode() + body)
        wait_until(lambda: host.asked > asked)
    left = time.monotonic()
    answer = post(address, served.make_body("What?", max_tokens=2))
    assert answer.status_code == 200 and time.monotonic() - left < 1
    assert read_metric(address, "onellm_abandoned_requests_total") == gone + 1
    host.release.set()


def test_media_that_come_too_late_and_requests_that_wait_for_them(
    address: str, host: SlowHost, hostname: str
) -> None:
    host.release.clear()
    asked = host.asked
    slow = served.make_body("What?", make_url_part(hostname, "slow"))
    picture = served.make_part("image", FIRST)
    plain = served.make_body("What?", max_tokens=2)
    seen = served.make_body("What?", picture, max_tokens=2)
    large = served.make_body("What?", picture, max_tokens=2, user="x" * 700_000)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, address, slow)
        wait_until(lambda: host.asked > asked)
        time.sleep(0.5)  # so that the first one's time is over well before this one's wait
        second = pool.submit(post, address, large)
        wait_until(lambda: read_metric(address, "onellm_unprepared_requests") == 1)
        assert post(address, plain).status_code == 200  # a text waits for nobody's media
        refused = post(address, seen)
        assert refused.status_code == 429 and "wait to be prepared" in refused.text
        full = post(address, large)
        assert full.status_code == 503 and "memory" in full.text and full.headers["Retry-After"]
        assert first.result().status_code == 504
        assert "within 2 s" in first.result().json()["error"]["message"]
        assert second.result().status_code == 200
    assert post(address, large).status_code == 200  # the memory of the others is free again
    host.release.set()


def test_the_files_of_a_request_are_counted_together(
    address: str, host: SlowHost, hostname: str
) -> None:
    host.data = FIRST + b"\0" * 600_000
    body = served.make_body("What?", make_url_part(hostname, "a"), max_tokens=2)
    assert post(address, body).status_code == 200
    parts = [make_url_part(hostname, name) for name in ("a", "b")]
    refused = post(address, served.make_body("What?", *parts))
    assert refused.status_code == 400 and "larger than 1 MiB together" in refused.text


def ask(address: str, messages: list[dict[str, Any]]) -> Any:
    body = json.dumps({"model": "toy", "messages": messages, "max_tokens": 12}).encode()
    return post(address, body).json()


def read_text(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.seconds
def test_several_media_of_a_modality_stand_where_their_parts_do(address: str) -> None:
    first, second = (served.make_part("image", picture) for picture in (FIRST, SECOND))
    words = [{"type": "text", "text": text} for text in ("Is ", " before ", "?")]
    one = ask(address, [{"role": "user", "content": [words[0], first, words[1], second, words[2]]}])
    text = build_prompt("Is <image> before <image>?", "conversation")
    assert read_text(one) == served.compute_placed(MODEL, text, [FIRST, SECOND])
    swapped = ask(
        address, [{"role": "user", "content": [words[0], second, words[1], first, words[2]]}]
    )
    assert read_text(swapped) == served.compute_placed(MODEL, text, [SECOND, FIRST])
    turns = ask(
        address,
        [
            {"role": "user", "content": [first, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": [{"type": "text", "text": "And this?"}, second]},
        ],
    )
    text = build_prompt("And this?<image>", "conversation").removeprefix(HEADER)
    text = build_prompt("<image>What?", "conversation") + " Red.\n" + text
    assert read_text(turns) == served.compute_placed(MODEL, text, [FIRST, SECOND])


def test_one_medium_of_a_modality_stands_behind_bos_wherever_its_part_is(address: str) -> None:
    part = served.make_part("image", FIRST)
    words = {"type": "text", "text": "What?"}
    found = [ask(address, [{"role": "user", "content": c}]) for c in ([part, words], [words, part])]
    wanted = served.compute_answer(MODEL, "What?", {"image": FIRST})
    assert [read_text(answer) for answer in found] == [wanted, wanted]


@pytest.mark.seconds
def test_characters_that_mark_media_are_refused_in_texts(address: str) -> None:
    found = ask(address, [{"role": "user", "content": "What \ue0f0image\ue0f1?"}])
    assert "U+E0F0" in found["error"]["message"] and "message 0" in found["error"]["message"]
