"""What is checked of a request before its body is read: its key, its size, its pace."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onellm_dist.serving.server.errors import RequestError, make_busy_error
from onellm_dist.serving.server.metrics import ServerMetrics
from onellm_dist.serving.server.settings import ServerSettings

COMPLETIONS = "/v1/chat/completions"
"""Path of the requests that metrics count."""
OPEN_PATHS = ("/health",)
"""Paths that need no key."""
_MOST_CLIENTS = 10_000
"""Clients whose pace is remembered."""


@dataclass
class _HeldBody:
    """How much of a request's body has come, in bytes."""

    size: int = 0


class RequestLimits:
    """An ASGI middleware: refuses requests without a key, too large, too slow, or too many.

    Args:
        app: what handles the other requests.
        settings: the limits.
        metrics: what is refused is counted in them.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._settings = settings
        self._pace = Pace(settings.requests_per_minute)
        self._held = 0  # bytes of the bodies of all requests under way
        self._most_held = max(settings.bodies_mb, settings.request_mb) << 20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held = _HeldBody()
        try:
            body = await self._check(scope, receive, held)
        except RequestError as error:
            if scope["path"] == COMPLETIONS:  # what passes is counted where it is answered
                self._metrics.requests.labels(status=error.status).inc()
            await error.to_response()(scope, receive, send)
        else:
            await self._app(scope, ReplayedBody(body, receive), send)
        finally:
            self._held -= held.size

    async def _check(self, scope: Scope, receive: Receive, held: _HeldBody) -> bytes:
        """Check a request, and read its body.

        Raises:
            RequestError: it is refused.
        """
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] in OPEN_PATHS:
            return b""
        key = self._find_key(headers.get(b"authorization", b""))
        if scope["method"] != "POST":
            return b""
        client = key or (scope["client"] or ("",))[0]
        if not self._pace.take(client):
            raise make_busy_error("too many requests a minute")
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            # Also what keeps web pages of others from asking a server on this machine.
            raise RequestError("the content type must be application/json", status=415)
        most = self._settings.request_mb << 20
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise self._make_size_error()
        try:
            return await asyncio.wait_for(
                self._read(receive, most, held), self._settings.receive_seconds
            )
        except asyncio.TimeoutError:
            raise RequestError(
                "the request did not come in time", status=408, headers={"Connection": "close"}
            ) from None

    async def _read(self, receive: Receive, most: int, held: _HeldBody) -> bytes:
        chunks, more = [], True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError("the client left", status=499)
            chunks.append(message.get("body", b""))
            held.size += len(chunks[-1])
            self._held += len(chunks[-1])
            more = message.get("more_body", False)
            if held.size > most:
                raise self._make_size_error()
            if self._held > self._most_held:
                raise RequestError(
                    "the requests under way take all the memory for them; try again later",
                    status=503,
                    kind="server_error",
                    headers={"Retry-After": "1", "Connection": "close"},
                )
        return b"".join(chunks)

    def _make_size_error(self) -> RequestError:
        return RequestError(
            f"the request is larger than {self._settings.request_mb} MiB",
            status=413,
            code="request_too_large",
            headers={"Connection": "close"},
        )

    def _find_key(self, header: bytes) -> str:
        """The key of a request; empty where none is asked for.

        Raises:
            RequestError: the key is missing or wrong.
        """
        if not self._settings.api_keys:
            return ""
        kind, _, given = header.partition(b" ")
        # All are compared, in constant time: its duration gives nothing away.
        found = [
            key
            for key in self._settings.api_keys
            if hmac.compare_digest(given.strip(), key.encode("ascii"))
        ]
        if kind.lower() != b"bearer" or not found:
            raise RequestError(
                "wrong or missing API key; send `Authorization: Bearer KEY`",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]


class ReplayedBody:
    """A `receive` that gives a body that was read already, then what the client sends next."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body = self._body
            self._body = None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        while message["type"] == "http.request":  # the end of a body that nobody reads
            message = await self._receive()
        return message


class Pace:
    """How many requests each client may still send: a bucket that fills up evenly.

    Args:
        per_minute: requests of a minute, which may come at once; 0: any number.
    """

    def __init__(self, per_minute: int) -> None:
        self._most = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float | None = None) -> bool:
        """Whether a client may send a request now.

        Args:
            client: its key or address.
            now: seconds of a clock; default: that of this machine.
        """
        if not self._most:
            return True
        now = time.monotonic() if now is None else now
        left, since = self._buckets.pop(client, (float(self._most), now))
        left = min(float(self._most), left + (now - since) * self._most / 60)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        while len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return allowed
