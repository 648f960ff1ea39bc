"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from onellm_dist.common.logging import get_logger
from onellm_dist.serving.server.chat import ChatService, RunningChat
from onellm_dist.serving.server.completions import CompletionWriter
from onellm_dist.serving.server.engine import AnswerEngine
from onellm_dist.serving.server.errors import RequestError, make_internal_error, make_json
from onellm_dist.serving.server.jobs import Ending, Piece
from onellm_dist.serving.server.limits import COMPLETIONS, RequestLimits
from onellm_dist.serving.server.metrics import ServerMetrics
from onellm_dist.serving.server.remote_llm import RemoteEngine
from onellm_dist.serving.server.settings import LOOPBACK_HOSTS

_log = get_logger(__name__)
_STARTED = int(time.time())


def build_app(
    service: ChatService, engine: AnswerEngine | RemoteEngine, metrics: ServerMetrics
) -> FastAPI:
    """Build the application.

    Args:
        service: answers requests.
        engine: runs the model; it starts and ends with the application.
        metrics: counted in.
    """

    @asynccontextmanager
    async def run_engine(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)
        service.media.close()

    app = FastAPI(title="onellm", lifespan=run_engine, docs_url=None, redoc_url=None)
    routes = _Routes(service, engine, metrics)
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/metrics", routes.measure, methods=["GET"])
    app.add_api_route("/v1/models", routes.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", routes.get_model, methods=["GET"])
    app.add_api_route(COMPLETIONS, routes.complete, methods=["POST"])
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_fault)
    app.add_middleware(RequestLimits, settings=service.settings, metrics=metrics)
    if service.settings.is_loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS, www_redirect=False)
    return app


async def _answer_http_error(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else "error"
    return RequestError(str(detail), status=status).to_response()


async def _answer_fault(_: Request, __: Exception) -> Response:
    return make_internal_error().to_response()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Routes:
    """What the paths answer."""

    def __init__(
        self, service: ChatService, engine: AnswerEngine | RemoteEngine, metrics: ServerMetrics
    ) -> None:
        self._service = service
        self._engine = engine
        self._metrics = metrics

    async def health(self) -> Response:
        """Whether requests are answered."""
        alive = self._engine.is_alive
        content = {"status": "ok" if alive else "failed", "waiting": len(self._service.queue)}
        return make_json(content, 200 if alive else 503)

    async def measure(self) -> Response:
        """Metrics in Prometheus' text format."""
        self._metrics.waiting.set(len(self._service.queue))
        self._metrics.preparing.set(self._service.gate.waiting)
        return Response(self._metrics.write(), media_type="text/plain; version=0.0.4")

    async def list_models(self) -> Response:
        """The model of this server, and its adapters as models of their own."""
        models = [self._describe(name) for name in self._service.settings.model_names]
        return make_json({"object": "list", "data": models})

    async def get_model(self, name: str) -> Response:
        """A model, by its name."""
        if name not in self._service.settings.model_names:
            error = RequestError(f"no model {name!r}", status=404, code="model_not_found")
            return error.to_response()
        return make_json(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        base = self._service.settings.name
        return {
            "id": name,
            "object": "model",
            "created": _STARTED,
            "owned_by": "onellm",
            "modalities": list(self._service.model.config.modalities),
            **({} if name == base else {"parent": base}),
        }

    async def complete(self, request: Request) -> Response:
        """Answer a request for a chat completion."""
        started = time.monotonic()
        try:
            response = await self._complete(request, started)
        except RequestError as error:
            response = error.to_response()
        except Exception:
            _log.exception("a request failed")
            response = make_internal_error().to_response()
        self._metrics.requests.labels(status=response.status_code).inc()
        return response

    async def _complete(self, request: Request, started: float) -> Response:
        chat = await self._prepare(request)
        writer = CompletionWriter(chat, self._service.text.tokenizer)
        chat.start()
        if chat.request.stream:
            events = self._stream(request, chat, writer, started)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        async with self._watch(request, chat):
            pieces = [item async for item in self._read(chat, started)]
        ending = pieces.pop()
        if not isinstance(ending, Ending):
            raise AssertionError("an answer ends with its ending")
        texts = [piece for piece in pieces if isinstance(piece, Piece)]
        return make_json(writer.write_whole(texts, ending))

    async def _prepare(self, request: Request) -> RunningChat:
        """Read a request, for as long as its client waits for it."""
        preparing = asyncio.create_task(self._service.prepare(await request.body()))
        leaving = asyncio.create_task(_wait_until_gone(request))
        try:
            await asyncio.wait({preparing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done():
                self._metrics.abandoned.inc()
                raise RequestError("the client left", status=499)
            return preparing.result()
        finally:
            preparing.cancel()
            leaving.cancel()

    @asynccontextmanager
    async def _watch(self, request: Request, chat: RunningChat) -> AsyncIterator[None]:
        """Give a request up as soon as its client leaves, and if it is not read to its end."""
        watching = asyncio.create_task(self._cancel_when_gone(request, chat))
        complete = False
        try:
            yield
            complete = True
        finally:
            watching.cancel()
            if not complete:
                chat.cancel()

    async def _cancel_when_gone(self, request: Request, chat: RunningChat) -> None:
        await _wait_until_gone(request)
        self._metrics.abandoned.inc()
        chat.cancel()

    async def _read(self, chat: RunningChat, started: float) -> AsyncIterator[Piece | Ending]:
        """An answer as it comes; measures it."""
        first = True
        async for item in chat.read():
            seconds = time.monotonic() - started
            if isinstance(item, Ending):
                self._metrics.seconds.observe(seconds)
            elif first:
                self._metrics.first_token.observe(seconds)
            first = False
            yield item

    async def _stream(
        self, request: Request, chat: RunningChat, writer: CompletionWriter, started: float
    ) -> AsyncIterator[bytes]:
        async with self._watch(request, chat):
            try:
                yield writer.open_stream()
                async for item in self._read(chat, started):
                    if isinstance(item, Ending):
                        yield writer.close_stream(item)
                    else:
                        yield writer.write_piece(item)
            except RequestError as error:
                yield writer.write_error(error)
