"""Media that are named by URLs: which are fetched, and how long and how much at most."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from onellm_dist.serving.server import fetch as fetching
from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.fetch import FetchBudget, check_url, fetch

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
DATA = b"x" * 1000


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@contextmanager
def answer(
    handle: Callable[[socket.socket, bytes], Any],
) -> Iterator[tuple[str, list[Future[Any]]]]:
    """A host whose connections are handled one after the other; yields it and what came of each."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        listening.settimeout(10)
        found: list[Future[Any]] = []

        def run() -> None:
            with suppress(OSError):  # the test has ended
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        done: Future[Any] = Future()
                        found.append(done)
                        done.set_result(handle(connection, connection.recv(1 << 16)))

        running = pool.submit(run)
        yield f"127.0.0.1:{listening.getsockname()[1]}", found
        listening.shutdown(socket.SHUT_RDWR)
        running.result()


def send_file(connection: socket.socket, asked: bytes) -> bytes:
    moved = asked.startswith(b"GET /moved ")
    found = b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"
    connection.sendall(found if moved else HEAD + DATA)
    return asked


def run(url: str, host: str, threads: Any, most: int = 1000) -> bytes:
    return asyncio.run(fetch(url, [host], FetchBudget(most), threads))


def test_only_trusted_hosts_are_fetched_from(threads: ThreadPoolExecutor) -> None:
    with answer(send_file) as (host, asked):
        budget = FetchBudget(2500)
        for _ in range(2):
            assert asyncio.run(fetch(f"http://{host}/x.png", [host], budget, threads)) == DATA
        with pytest.raises(RequestError, match="larger than 0 MiB together"):
            asyncio.run(fetch(f"http://{host}/x.png", [host], budget, threads))
        with pytest.raises(RequestError, match="HTTP 302"):
            run(f"http://{host}/moved", host, threads)
        assert len(asked) == 4  # where it was moved to was not asked for
    with pytest.raises(RequestError, match="cannot be fetched"):
        run(f"http://{host}/x.png", host, threads)


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.org/x", "http://trusted.org:81/x", "ftp://trusted.org/x"),
        *("http://trusted.org.evil.org/x", "http://evil.org/trusted.org", "//trusted.org/x"),
        *("http://user:pw@trusted.org/x", "http://trusted.org@evil.org/", "file:///etc/passwd"),
        *("http://trusted.org#@evil.org/../x y", "http://evil.org\\@trusted.org/x"),
        *("http://127.0.0.1/", "http://[::1]/", "http://0x7f000001/", "http://2130706433/"),
        *("http://169.254.169.254/latest/meta-data", "http://trusted.org./x", "http://\u24e3.org"),
        *("http://trusted.org/x y", "http://trusted.org/\u00e9", "http://trusted.org:99999/x"),
        *("http://trusted.org/a\r\nHost: evil.org", "http://trusted.org\t.evil.org/x", "http://["),
    ],
)
def test_other_addresses_are_refused(url: str) -> None:
    check_url("http://trusted.org/x?y=1", ["trusted.org"])
    with pytest.raises(RequestError, match=r"does not fetch|not valid|percent-encoded"):
        check_url(url, ["trusted.org"])


def test_a_url_is_asked_for_as_it_is_written(threads: ThreadPoolExecutor) -> None:
    """Signed URLs do not survive another encoding."""
    with answer(send_file) as (host, asked):
        path = "/a%2Fb+c%41/../d?s=%2b+%7E&t=a/b"
        assert run(f"http://{host}{path}", host, threads) == DATA
        got = asked[0].result(10)
    assert got.startswith(f"GET {path} HTTP/1.1\r\n".encode())
    assert f"\r\nHost: {host}\r\n".encode() in got


def stall(sent: bytes, drips: bool) -> Callable[[socket.socket, bytes], float]:
    def handle(connection: socket.socket, _: bytes) -> float:
        began = time.monotonic()
        with suppress(OSError):  # the client closes the connection
            connection.sendall(sent)
            connection.settimeout(0.02)
            while time.monotonic() < began + 10:
                try:
                    if not connection.recv(1):
                        break
                except TimeoutError:
                    connection.sendall(b"x" if drips else b"")
        return time.monotonic() - began

    return handle


SLOW = {
    "no answer": (b"", False),
    "endless header": (b"HTTP/1.1 200 OK\r\nX-Long: ", True),
    "stalled content": (HEAD + b"x", False),
    "content drop by drop": (HEAD, True),
}


@pytest.mark.parametrize(("sent", "drips"), SLOW.values(), ids=SLOW)
def test_a_host_that_takes_too_long_is_given_up(
    monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor, sent: bytes, drips: bool
) -> None:
    """The connection is closed, and no thread keeps waiting for it."""
    monkeypatch.setattr(fetching, "SECONDS", 0.3)
    with answer(stall(sent, drips)) as (host, left):
        count = threading.active_count()
        began = time.monotonic()
        with pytest.raises(RequestError, match="cannot be fetched"):
            run(f"http://{host}/x.png", host, threads)
        assert time.monotonic() - began < 1.9
        assert threading.active_count() <= count
        assert left[0].result(10) < 3


def flood(sent: bytes) -> Callable[[socket.socket, bytes], int]:
    """Send lines for as long as they are taken; returns their bytes."""

    def handle(connection: socket.socket, _: bytes) -> int:
        lines, count = b"".join(b"X-%d: y\r\n" % number for number in range(5000)), 0
        with suppress(OSError):  # the client closes the connection
            connection.settimeout(10)
            connection.sendall(sent)
            while count < 64 << 20:
                connection.sendall(lines)
                count += len(lines)
        return count

    return handle


CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"


@pytest.mark.parametrize("sent", [b"HTTP/1.1 200 OK\r\n", CHUNK], ids=["headers", "trailers"])
def test_a_host_cannot_fill_the_memory_with_headers(
    threads: ThreadPoolExecutor, sent: bytes
) -> None:
    with answer(flood(sent)) as (host, taken):
        with pytest.raises(RequestError, match="cannot be fetched"):
            run(f"http://{host}/x.png", host, threads)
        assert taken[0].result(20) < 32 << 20


def test_nobody_waits_for_a_file_whose_client_has_left(threads: ThreadPoolExecutor) -> None:
    async def leave(host: str) -> None:
        task = asyncio.create_task(
            fetch(f"http://{host}/x.png", [host], FetchBudget(1000), threads)
        )
        while not left:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with answer(stall(HEAD, True)) as (host, left):
        asyncio.run(leave(host))
        assert left[0].result(10) < 3


def test_a_name_that_is_not_found_in_time_holds_up_nothing_else(
    monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor
) -> None:
    monkeypatch.setattr(fetching, "SECONDS", 0.2)
    released = threading.Event()
    found = socket.getaddrinfo

    def find(host: str, *more: Any) -> Any:
        if host == "slow.example":
            released.wait(10)
        return found("127.0.0.1" if host == "quick.example" else host, *more)

    monkeypatch.setattr(socket, "getaddrinfo", find)

    async def ask() -> int:
        """How many of the threads that requests are read in answered meanwhile."""
        urls = [f"http://slow.example/{number}" for number in range(6)]
        asked = [
            asyncio.create_task(fetch(url, ["slow.example"], FetchBudget(9), threads))
            for url in urls
        ]
        await asyncio.sleep(0.05)
        done = await asyncio.wait_for(asyncio.to_thread(int, "7"), 2)
        for task in asked:
            with pytest.raises(RequestError, match="cannot be fetched"):
                await task
        return done

    try:
        assert asyncio.run(ask()) == 7
    finally:
        released.set()
    with answer(send_file) as (host, _):
        port = host.split(":")[1]
        own = f"quick.example:{port}"
        monkeypatch.setattr(fetching, "SECONDS", 10)
        assert run(f"http://{own}/x", own, threads) == DATA
