"""Starting the chat: the server's engine behind a page instead of an interface for programs."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from onellm_dist.serving.chat.uploads import UploadsOnly
from onellm_dist.serving.server.chat import ChatService
from onellm_dist.serving.server.engine import AnswerEngine
from onellm_dist.serving.server.remote_llm import RemoteEngine
from onellm_dist.serving.server.run import (
    build_service,
    check_model,
    describe_address,
    listen,
    open_model,
    run,
)
from onellm_dist.serving.server.settings import LOOPBACK_HOSTS, ServerSettings

USER = "onellm"
"""Who logs in where a key is asked for; the key is the password."""
_UPLOADS = "uploads"
_GRACE_SECONDS = 5
"""How long open pages keep a chat that ends from ending."""


def chat(model: Path, settings: ServerSettings) -> None:
    """Let people talk to a model in their browsers, until SIGTERM or Ctrl-C.

    Args:
        model: a onellm directory.
        settings: the server's.

    Raises:
        UsageError: the model or the address cannot be used.
    """
    check_model(model)
    listening = listen(settings.host, settings.port)
    with tempfile.TemporaryDirectory(prefix="onellm-chat-") as folder:
        # Before Gradio is imported: it reads these once. Files of users go when the chat ends.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, _UPLOADS))
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        network, tokenizer = open_model(model, settings)
        service, engine, _ = build_service(network, tokenizer, settings, warm_up=True)
        app = build_chat(service, engine, Path(folder))
        message = f"chat with {model} on {describe_address(listening)}"
        run(app, settings, listening, message, grace=_GRACE_SECONDS)


def build_chat(service: ChatService, engine: AnswerEngine | RemoteEngine, folder: Path) -> FastAPI:
    """Build the application.

    Args:
        service: answers requests.
        engine: runs the model; it starts and ends with the application.
        folder: for pictures and the files of examples.
    """
    import gradio as gr

    from onellm_dist.serving.chat.desk import ChatDesk
    from onellm_dist.serving.chat.layout import CSS, KEYS
    from onellm_dist.serving.chat.page import ChatPage

    @asynccontextmanager
    async def run_engine(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)
        service.media.close()

    settings = service.settings
    pictures = folder / "pictures"
    pictures.mkdir()
    desk = ChatDesk(service, pictures)
    page = ChatPage(desk, settings, service.text.name, folder, folder / _UPLOADS)
    app = FastAPI(lifespan=run_engine, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(UploadsOnly, uploads=folder / _UPLOADS, seconds=settings.receive_seconds)
    if settings.is_loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS, www_redirect=False)
    options: dict[str, Any] = {
        "allowed_paths": [str(pictures)],
        "max_file_size": settings.request_mb << 20,
        "auth": [(USER, key) for key in settings.api_keys] or None,
        "ssr_mode": False,
        "show_error": False,
        "run_history": False,
        "footer_links": [],
        "css": CSS,
        "js": KEYS,
        # Fonts of the system: none is fetched from elsewhere.
        "theme": gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
    }
    mounted: FastAPI = gr.mount_gradio_app(app, page.blocks, path="", **options)
    return mounted
