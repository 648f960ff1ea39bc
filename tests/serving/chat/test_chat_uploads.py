"""Requests that programs make up for the page of the chat: what reaches Gradio, and what not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from onellm_dist.serving.chat.uploads import UploadsOnly, is_upload

JOIN = "/gradio_api/queue/join"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands where Gradio is: answers with the body."""
    body = await Request(scope, receive).body()
    await Response(b"passed " + body)(scope, receive, send)


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    folder = tmp_path / "uploads"
    (folder / "hash").mkdir(parents=True)
    (folder / "hash" / "cat.png").write_bytes(b"cat")
    (folder / "link").symlink_to("/etc/passwd")
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


@pytest.fixture
def client(uploads: Path) -> TestClient:
    return TestClient(UploadsOnly(echo, uploads, 5))


def make_body(path: Any) -> bytes:
    """What the page sends when a medium is attached."""
    medium = {"path": path, "url": "http://x/y", "meta": {"_type": "gradio.FileData"}}
    return json.dumps({"data": ["image", medium, None], "fn_index": 3}).encode()


def test_uploaded_files_reach_the_page(client: TestClient, uploads: Path) -> None:
    body = make_body(str(uploads / "hash" / "cat.png"))
    answer = client.post(JOIN, content=body)
    assert answer.content == b"passed " + body
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert client.post("/gradio_api/reset").content == b"passed "
    assert client.get(f"/gradio_api/file={uploads}/hash/cat.png").status_code == 200
    large = b"no JSON" * 200_000  # the bytes of files come as they are
    assert client.post("/gradio_api/upload", content=large).content == b"passed " + large


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "../../../../../../etc/passwd", "", ".", "{uploads}/../secret"),
        *("{uploads}/link", "{uploads}-other/x", "a\0b", 5, None, ["x"]),
        *("http://example.org/cat.png", "https://example.org{uploads}", "file://{uploads}/x"),
        "http://example.org/" + "../" * 40 + "{uploads}/hash/cat.png",
    ],
)
def test_other_files_and_addresses_do_not(client: TestClient, uploads: Path, path: Any) -> None:
    path = path.format(uploads=uploads) if isinstance(path, str) else path
    assert not is_upload(path, uploads)
    nested = json.dumps({"data": [[{"value": {"files": [{"path": path}]}}]]}).encode()
    for body in (make_body(path), nested):
        answer = client.post(JOIN, content=body)
        assert answer.status_code == 403 and "not uploaded" in answer.text


@pytest.mark.parametrize(
    "path",
    [
        *("file=http://example.org/", "file=https%3A%2F%2Fexample.org", "file/http://example.org"),
        *("proxy=http://example.org", "proxy=x.hf.space/y"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_no_address_is_fetched(client: TestClient, path: str, method: str) -> None:
    assert client.request(method, f"/gradio_api/{path}").status_code == 403


def test_bodies_that_cannot_be_read_are_refused(client: TestClient) -> None:
    cases = ((b"no JSON", 400), (b"[" * 100_000, 400), (b"[" + b" " * (1 << 20) + b"]", 413))
    for body, status in cases:
        answer = client.post(JOIN, content=body)
        assert answer.status_code == status and "passed" not in answer.text
    deep = b'{"a":' * 300 + b'{"path":"/etc/passwd"}' + b"}" * 300
    assert client.post(JOIN, content=deep).status_code == 403


def test_a_body_that_does_not_come_is_given_up(uploads: Path) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "POST", "path": JOIN, "headers": []}
    asyncio.run(UploadsOnly(echo, uploads, 0.05)(scope, receive, send))
    assert sent[0]["status"] == 408
