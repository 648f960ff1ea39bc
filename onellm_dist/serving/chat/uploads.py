"""Keeps programs from asking the page for files and addresses that its users did not send."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.limits import ReplayedBody
from onellm_dist.serving.server.schema import read_json

_FORMS = ("/gradio_api/upload", "/login")
"""Paths that are sent files or fields, and no JSON."""
_MOST_BYTES = 1 << 20
"""Largest body of JSON: it names files, and has none."""
_POLICY = "connect-src 'self' data: blob:"
"""Scripts of the page send nothing to other machines (Gradio's button to share a picture would)."""


class UploadsOnly:
    """An ASGI middleware: refuses requests that name files which no user sent, or addresses.

    Gradio would fetch any public URL, and checks paths only where it runs its own server, not where
    it is mounted.

    Args:
        app: what handles the other requests.
        uploads: where Gradio keeps what users sent.
        seconds: longest time in which a body must have come.
    """

    def __init__(self, app: ASGIApp, uploads: Path, seconds: float) -> None:
        self._app = app
        self._uploads = uploads
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        try:
            body = await self._check(scope, receive)
        except RequestError as error:
            await error.to_response()(scope, receive, send)
            return
        given: Receive = receive if body is None else ReplayedBody(body, receive)
        await self._app(scope, given, send_with_policy)

    async def _check(self, scope: Scope, receive: Receive) -> bytes | None:
        """Check a request; returns its body if that was read.

        Raises:
            RequestError: it is refused.
        """
        path = scope["path"]
        if "://" in path or "proxy=" in path:
            raise RequestError("this page fetches nothing from other machines", status=403)
        if scope["method"] in ("GET", "HEAD", "OPTIONS") or path.rstrip("/") in _FORMS:
            return None
        try:
            body = await asyncio.wait_for(_read_body(receive), self._seconds)
        except asyncio.TimeoutError:
            raise RequestError(
                "the request did not come in time", status=408, headers={"Connection": "close"}
            ) from None
        if body and not _has_only_uploads(read_json(body), self._uploads):
            raise RequestError("the request names a file that was not uploaded", status=403)
        return body


def is_upload(path: Any, uploads: Path) -> bool:
    """Whether something is the path of a file that a user sent.

    Args:
        path: what a request names.
        uploads: where Gradio keeps what users sent.
    """
    try:
        given = Path(path)
        # `http://host/../../uploads/x`, an address, would resolve to an upload.
        return given.is_absolute() and given.resolve().is_relative_to(uploads.resolve())
    except (OSError, RuntimeError, TypeError, ValueError):  # no path, or one that leads nowhere
        return False


async def _read_body(receive: Receive) -> bytes:
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the client left", status=499)
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > _MOST_BYTES:
            raise RequestError(
                f"the request is larger than {_MOST_BYTES >> 20} MiB",
                status=413,
                headers={"Connection": "close"},
            )
        more = message.get("more_body", False)
    return b"".join(chunks)


def _has_only_uploads(content: Any, uploads: Path) -> bool:
    """Whether all files that JSON names, at any depth, were uploaded."""
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if "path" in value and not is_upload(value["path"], uploads):
                return False
            left += value.values()
        elif isinstance(value, list):
            left += value
    return True
