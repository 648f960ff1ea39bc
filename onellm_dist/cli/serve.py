"""`onellm serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[Path, typer.Argument(help="A onellm directory.")],
    host: Annotated[str, typer.Option(help="Address; others than 127.0.0.1 need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    name: Annotated[
        str, typer.Option(help="The model's name in requests.", show_default="the directory's")
    ] = "",
    prompt_format: Annotated[
        str, typer.Option("--format", help="Prompt format: auto, chat, conversation or raw.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Requests that are answered together.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, help="Temperature where a request names none; 0: greedy.")
    ] = 0.0,
    request_mb: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 64,
    media: Annotated[int, typer.Option(min=0, help="Most media of a request.")] = 16,
    request_seconds: Annotated[
        float, typer.Option(min=1, help="Longest time that a request may take.")
    ] = 600.0,
    requests_per_minute: Annotated[
        int, typer.Option(min=0, help="Requests of one key or address; 0: any number.")
    ] = 0,
    readers: Annotated[int, typer.Option(min=1, help="Processes that decode media.")] = 2,
    url_host: Annotated[
        list[str] | None,
        typer.Option(help="A host from which media may be fetched. Repeatable; default: none."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="ONELLM_API_KEY",
            help="A key that requests must have. Repeatable; better set in the environment, where "
            "other users do not see it.",
        ),
    ] = None,
) -> None:
    """Serve a model with the interface of OpenAI's chat completions.

    Example: onellm serve runs/tune/model --port 8000
    """
    from onellm_dist.common.errors import UsageError

    try:
        from onellm_dist.serving.server.run import serve as run_server
        from onellm_dist.serving.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the package {error.name} is not installed",
            "the server needs it.",
            "pip install 'onellm-dist[serve]'",
        ) from None
    settings = ServerSettings(
        name=name or model.resolve().name,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        prompt_format=prompt_format,
        batch=batch,
        queue=queue,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        request_mb=request_mb,
        media=media,
        readers=readers,
        request_seconds=request_seconds,
        requests_per_minute=requests_per_minute,
        url_hosts=tuple(host.lower() for host in url_host or ()),
    )
    run_server(model, settings)
