"""Starting the server, and ending it without losing a request."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from onellm_dist.common.errors import UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.output import write_output
from onellm_dist.common.resources import count_cpus
from onellm_dist.common.workers.samples import SampleLimits
from onellm_dist.model.adapters.adapter_set import AdapterSet, NamedAdapter, check_adapters
from onellm_dist.serving.generate import choose_dtype
from onellm_dist.serving.server.app import build_app
from onellm_dist.serving.server.chat import ChatService
from onellm_dist.serving.server.engine import AnswerEngine
from onellm_dist.serving.server.jobs import JobQueue
from onellm_dist.serving.server.media import MediaReader
from onellm_dist.serving.server.metrics import ServerMetrics
from onellm_dist.serving.server.preparing import PreparationGate
from onellm_dist.serving.server.prompts import ServedFormat
from onellm_dist.serving.server.remote_llm import EmbeddingsAlone, RemoteAddress, RemoteEngine
from onellm_dist.serving.server.settings import ServerSettings

_log = get_logger(__name__)
KEEP_ALIVE_SECONDS = 15


def serve(model: Path, settings: ServerSettings, adapters: Sequence[NamedAdapter] = ()) -> None:
    """Serve a model until SIGTERM or Ctrl-C; requests that were accepted are answered first.

    Args:
        model: a onellm directory.
        settings: the server's.
        adapters: those of `settings.adapters`.

    Raises:
        UsageError: the model, an adapter or the address cannot be used.
    """
    check_model(model)
    check_adapters(model, adapters)
    listening = listen(settings.host, settings.port)
    network, tokenizer = open_model(model, settings)
    loaded = AdapterSet(network, adapters)
    app = assemble(network, tokenizer, settings, warm_up=True, adapters=loaded)
    run(app, settings, listening, f"serving {model} on {describe_address(listening)}/v1")


def check_model(model: Path) -> None:
    """Check that a directory has a model, before anything is started for it.

    Raises:
        UsageError: it has none, or it is damaged.
    """
    choose_dtype(model)


def open_model(model: Path, settings: ServerSettings) -> tuple[Any, Any]:
    """Load a model to answer with, onto the GPU where there is one.

    Args:
        model: a onellm directory.
        settings: the server's.

    Returns:
        The model in evaluation mode and its tokenizer.

    Raises:
        UsageError: the model cannot be used.
    """
    import torch

    from onellm_dist.model.presets import load_model

    network: Any
    network, processor = load_model(path=model, preset=None, seed=0, **choose_dtype(model))
    network.eval()
    if settings.llm_url:
        network.llm = EmbeddingsAlone(network.llm)  # its layers run elsewhere
    if torch.cuda.is_available():
        network.to("cuda")
    return network, processor.tokenizer


def limit_threads() -> None:
    """Let the LLM and the encoder of media, which compute at once, share a CPU's processors.

    OpenMP's threads wait for each other after every operation. Where one has no processor, the
    others spin meanwhile: with other work beside it, a small model takes ten times as long.
    """
    import torch

    # Whoever sets the variable has counted the processors.
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, count_cpus() // 2))


def describe_address(listening: socket.socket) -> str:
    """The URL of a socket that is listened on."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def assemble(
    model: Any,
    tokenizer: Any,
    settings: ServerSettings,
    *,
    warm_up: bool = False,
    adapters: AdapterSet | None = None,
) -> FastAPI:
    """Put an application together.

    Args:
        model: a OneLLMForConditionalGeneration in evaluation mode.
        tokenizer: its tokenizer.
        settings: the server's.
        warm_up: as of `build_service`.
        adapters: as of `build_service`.

    Raises:
        UsageError: the tokenizer does not fit the prompt format.
    """
    service = build_service(model, tokenizer, settings, warm_up=warm_up, adapters=adapters)
    return build_app(*service)


def build_service(
    model: Any,
    tokenizer: Any,
    settings: ServerSettings,
    *,
    warm_up: bool = False,
    adapters: AdapterSet | None = None,
) -> tuple[ChatService, AnswerEngine | RemoteEngine, ServerMetrics]:
    """Build what answers requests.

    Args:
        model: a OneLLMForConditionalGeneration in evaluation mode.
        tokenizer: its tokenizer.
        settings: the server's.
        warm_up: whether to start the processes that decode media now, not with the first medium.
        adapters: the model's, those of `settings.adapters`.

    Returns:
        What reads requests, what runs the model, and what both are counted in.

    Raises:
        UsageError: the tokenizer does not fit the prompt format.
    """
    text = ServedFormat.choose(settings.prompt_format, tokenizer)
    reader = MediaReader(settings.readers, SampleLimits(settings.media_seconds, settings.media_mb))
    if warm_up:
        reader.warm_up()
    queue, metrics = JobQueue(settings.queue), ServerMetrics()
    gate = PreparationGate(settings.preparing, settings.queue, settings.prepare_seconds)
    engine: AnswerEngine | RemoteEngine
    if settings.llm_url:
        address = RemoteAddress(settings.llm_url, settings.llm_model, settings.llm_key)
        engine = RemoteEngine(model, address, text.end_ids, queue, metrics, settings.batch)
    else:
        engine = AnswerEngine(
            model, tokenizer, text.end_ids, queue, metrics, settings.batch, adapters
        )
        if engine.encodes_ahead:
            limit_threads()
    resolvers = ThreadPoolExecutor(settings.preparing, thread_name_prefix="resolve")
    return ChatService(model, text, reader, queue, gate, resolvers, settings), engine, metrics


def listen(host: str, port: int) -> socket.socket:
    """Open the address before the model is loaded: a taken port is said at once.

    Raises:
        UsageError: it cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: {error.strerror or error}",
            "the server cannot listen there.",
            "choose another port; 0 takes a free one.",
        ) from None
    return listening


def make_config(
    app: FastAPI, settings: ServerSettings, *, grace: int | None = None
) -> uvicorn.Config:
    """The configuration of uvicorn, with the limits of the server.

    Args:
        app: the application.
        settings: the server's.
        grace: seconds that open connections have to end once the server ends; None: any.
    """
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http="h11",
        ws="none",
        limit_concurrency=settings.connections,
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace,
    )


def run(
    app: FastAPI,
    settings: ServerSettings,
    listening: socket.socket,
    message: str,
    *,
    grace: int | None = None,
) -> None:
    """Run an application until a signal; then finish what was accepted.

    Args:
        app: the application.
        settings: the server's.
        listening: the socket.
        message: printed once requests are taken.
        grace: as of `make_config`.
    """

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            write_output(message, flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again once it has ended; a proper end is not a failure.
        signal.signal(number, lambda *_: None)
    Announcing(make_config(app, settings, grace=grace)).run(sockets=[listening])
