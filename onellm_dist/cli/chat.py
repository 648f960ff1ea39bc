"""`onellm chat`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def chat(
    model: Annotated[Path, typer.Argument(help="A onellm directory.")],
    host: Annotated[str, typer.Option(help="Address; others than 127.0.0.1 need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 7860,
    prompt_format: Annotated[
        str, typer.Option("--format", help="Prompt format: auto, chat, conversation or raw.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Number of users answered in one batch.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the longest answer that can be asked for.")
    ] = 512,
    request_mb: Annotated[
        int, typer.Option(min=1, help="Largest file, and all files of a conversation, in MiB.")
    ] = 64,
    media: Annotated[int, typer.Option(min=1, help="Most media of a conversation.")] = 16,
    request_seconds: Annotated[
        float, typer.Option(min=1, help="Longest time that an answer may take.")
    ] = 600.0,
    readers: Annotated[int, typer.Option(min=1, help="Processes that decode media.")] = 2,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="ONELLM_API_KEY",
            help="A password with which the user `onellm` logs in. Repeatable; better set in the "
            "environment, where other users do not see it.",
        ),
    ] = None,
) -> None:
    """Talk to a model in a browser, about media of all its modalities.

    Example: onellm chat runs/tune/model
    """
    _check_packages()
    from onellm_dist.serving.chat.run import chat as run_chat
    from onellm_dist.serving.server.settings import ServerSettings

    settings = ServerSettings(
        name=model.resolve().name,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        prompt_format=prompt_format,
        batch=batch,
        max_new_tokens=max_new_tokens,
        request_mb=request_mb,
        media=media,
        request_seconds=request_seconds,
        readers=readers,
    )
    run_chat(model, settings)


def _check_packages() -> None:
    """Refuse a page whose packages are missing.

    Raises:
        UsageError: one is not installed.
    """
    from onellm_dist.common.errors import UsageError
    from onellm_dist.common.extras import get_install_command

    missing = [name for name in ("gradio", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the package {' and '.join(missing)} is not installed",
            "the page of the chat needs it.",
            get_install_command("ui"),
        )
