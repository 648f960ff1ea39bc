"""An LLM that another server runs: it is sent prompts as embeddings.

vLLM takes `prompt_embeds` in its completions (`vllm serve DIR --enable-prompt-embeds`). So the LLM
of a model, converted with `--to hf`, can be served by a stock vLLM: text embeddings and media spans
are computed here, as generation here hands them to the LLM, and the answers come from there.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.model.generation.media_cache import MediaCache
from onellm_dist.model.generation.rows import pack_prompts
from onellm_dist.serving.server.errors import RequestError, make_internal_error, make_late_error
from onellm_dist.serving.server.jobs import Ending, Job, JobQueue, Piece
from onellm_dist.serving.server.metrics import ServerMetrics

_log = get_logger(__name__)
_MOST_LINE = 1 << 20
"""Bytes of the longest event that is read."""
_CONNECT_SECONDS = 10.0
"""Longest wait for a connection to an address of the other server: nothing can end it sooner.

A name with several addresses (IPv6 and IPv4) is given so long for each, plus the time that the
system takes to look it up."""
_REASONS = ("stop", "length")
"""How a whole answer ends; anything else (vLLM's `abort`) is a part of one."""


@dataclass(frozen=True)
class RemoteAddress:
    """Where an LLM is served.

    Attributes:
        url: address of its OpenAI-compatible interface, such as `http://127.0.0.1:8001/v1`.
        model: its name there; empty: the only one.
        key: its API key; empty: none.
    """

    url: str
    model: str = ""
    key: str = ""

    def connect(self, seconds: float) -> http.client.HTTPConnection:
        """Open a connection.

        Args:
            seconds: longest wait for an answer.
        """
        parts = urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        return kind(parts.hostname or "", parts.port, timeout=seconds)

    def get_path(self, name: str) -> str:
        """The path of one of its routes."""
        return f"{urlsplit(self.url).path.rstrip('/')}/{name}"

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        plain = {"Content-Type": "application/json"}
        return {**plain, "Authorization": f"Bearer {self.key}"} if self.key else plain

    def find_model(self) -> str:
        """The LLM's name there.

        Raises:
            UsageError: the server cannot be reached, or does not have the LLM.
        """
        try:
            with closing(self.connect(_CONNECT_SECONDS)) as connection:
                connection.request("GET", self.get_path("models"), headers=self.headers)
                response = connection.getresponse()
                content = json.loads(response.read(_MOST_LINE))
            names = [str(model["id"]) for model in content["data"]]
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            raise UsageError(
                f"--llm-url {self.url}: {type(error).__name__}: {error}",
                "no list of models could be read there.",
                "start it first: vllm serve DIR --enable-prompt-embeds; the URL ends in /v1.",
            ) from None
        if (self.model and self.model not in names) or (len(names) != 1 and not self.model):
            raise UsageError(
                f"--llm-url {self.url} serves {', '.join(names) or 'nothing'}",
                f"{self.model or 'its only model'} was asked for.",
                "name one of them with --llm-model.",
            )
        return self.model or names[0]


class EmbeddingsAlone(nn.Module):
    """What is left of an LLM whose layers run elsewhere: its embeddings.

    Args:
        llm: the LLM.
    """

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self.config = llm.config
        self.embedding = llm.get_input_embeddings()

    def get_input_embeddings(self) -> Any:
        """The token embedding."""
        return self.embedding

    @property
    def device(self) -> torch.device:
        """The device of the embeddings."""
        return next(self.parameters()).device


class RemoteEngine:
    """Answers the requests of a queue by an LLM that another server runs.

    Args:
        model: a OneLLMForConditionalGeneration in evaluation mode; only its embeddings, encoder and
            UPM are used.
        address: where the LLM is served.
        end_ids: tokens that end an answer.
        queue: the requests.
        metrics: counted in.
        batch: most requests that are answered at once.
    """

    def __init__(
        self,
        model: Any,
        address: RemoteAddress,
        end_ids: Sequence[int],
        queue: JobQueue,
        metrics: ServerMetrics,
        batch: int,
    ) -> None:
        self._model = model
        self._address = address
        self._name = address.find_model()
        self._end_ids = list(end_ids)
        self._queue = queue
        self._metrics = metrics
        self._media = MediaCache()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"remote-{number}", daemon=True)
            for number in range(batch)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Answer what waits, and end the threads."""
        self._queue.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return all(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while jobs := self._queue.take(1):
            (job,) = jobs
            if job.is_cancelled:
                continue
            self._metrics.running.inc()
            try:
                self._answer(job)
            except OneLLMError as error:
                job.fail(RequestError.from_error(error))
            except RequestError as error:
                job.fail(error)
            except Exception:
                _log.exception("a request failed")
                job.fail(make_internal_error())
            finally:
                self._metrics.running.dec()

    def _answer(self, job: Job) -> None:
        if job.is_late:
            raise make_late_error()
        request = self._build_request(job)
        if request is None or job.is_cancelled:
            return
        body = json.dumps(request).encode()
        tokens, reason, text = 0, "", StrippedText()
        try:
            for event in self._ask(job, body):
                if not isinstance(event, dict) or event.get("error"):
                    raise ValueError(f"an event that is not an answer: {str(event)[:2000]}")
                usage = event.get("usage") or {}
                tokens = usage.get("completion_tokens") or tokens
                for choice in event.get("choices") or ():
                    reason = choice.get("finish_reason") or reason
                    if shown := text.add(choice.get("text") or ""):
                        job.send(Piece(shown))
            if reason not in _REASONS:
                raise ValueError(f"the answer is cut off (finish_reason {reason!r})")
        except (OSError, ValueError, http.client.HTTPException) as error:
            if job.is_cancelled:
                return
            if job.is_late or isinstance(error, TimeoutError):
                raise make_late_error() from None
            _log.error("%s: %s: %s", self._address.url, type(error).__name__, error)
            raise RequestError(
                "the server of the LLM gave no complete answer", status=502, kind="server_error"
            ) from None
        job.send(Ending(reason, tokens))
        self._metrics.count_tokens(job.prompt.positions, tokens)

    def _build_request(self, job: Job) -> dict[str, Any] | None:
        """What is sent for a request; None: it was given up while others were being encoded."""
        prompt = job.prompt
        with self._lock, torch.inference_mode():
            if job.is_cancelled:
                return None
            embeds = pack_prompts(self._model, [prompt], self._media).sequence
        buffer = io.BytesIO()
        torch.save(embeds.cpu().clone(), buffer)
        return {
            "model": self._name,
            "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
            "max_tokens": prompt.max_new_tokens,
            "temperature": prompt.temperature,
            "top_p": prompt.top_p,
            "seed": prompt.seed,
            "stop": list(job.stops),
            "stop_token_ids": self._end_ids,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _ask(self, job: Job, body: bytes) -> Iterator[Any]:
        """Send a request, and yield the events of its answer.

        Raises:
            RequestError: it is refused there.
        """
        seconds = max(job.deadline - time.monotonic(), 0.1)
        with closing(self._address.connect(min(seconds, _CONNECT_SECONDS))) as connection:
            reading = _connect(connection, seconds)
            job.on_cancel(lambda: _end(reading))
            path = self._address.get_path("completions")
            connection.request("POST", path, body, self._address.headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                said = response.read(2000).decode(errors="replace")
                _log.error("%s: status %d: %s", self._address.url, response.status, said)
                raise RequestError(
                    f"the server of the LLM refuses the request (status {response.status})",
                    status=502,
                    kind="server_error",
                )
            while line := response.readline(_MOST_LINE):
                if job.is_cancelled:
                    return
                data = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield json.loads(data)


class StrippedText:
    """Leaves out the blanks before and behind a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False

    def add(self, text: str) -> str:
        """Add a piece; returns what can be shown: blanks wait for what follows them."""
        text = self._held + text
        text = text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        return shown


def _connect(connection: http.client.HTTPConnection, seconds: float) -> socket.socket:
    """Connect, and let each later wait take so many seconds; returns the socket.

    Raises:
        OSError: there is no connection.
    """
    try:
        connection.connect()
    except TimeoutError:  # the request is not late, the server is away
        raise ConnectionError("no connection in time") from None
    connection.sock.settimeout(seconds)
    return connection.sock


def _end(reading: socket.socket) -> None:
    """Wake a thread that reads from a connection: its client has left.

    The connection itself does not know its socket any more where the other server closes it behind
    the answer (HTTP/1.0, `Connection: close`).
    """
    try:
        reading.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
