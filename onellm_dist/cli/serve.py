"""`onellm serve`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ModelName = Annotated[
    str, typer.Option(help="The model's name in requests.", show_default="the directory's")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR",
        help="An adapter of this model, which requests choose by NAME as their model. Repeatable.",
    ),
]


def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A onellm directory.")],
    host: Annotated[str, typer.Option(help="Address; others than 127.0.0.1 need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    name: ModelName = "",
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
    preparing: Annotated[int, typer.Option(min=1, help="Requests that read media at once.")] = 8,
    prepare_seconds: Annotated[
        float, typer.Option(min=1, help="Longest time that it takes to read a request's media.")
    ] = 120.0,
    request_seconds: Annotated[
        float, typer.Option(min=1, help="Longest time that a request may take.")
    ] = 600.0,
    requests_per_minute: Annotated[
        int, typer.Option(min=0, help="Requests of one key or address; 0: any number.")
    ] = 0,
    readers: Annotated[int, typer.Option(min=1, help="Processes that decode media.")] = 2,
    adapter: Adapters = None,
    url_host: Annotated[
        list[str] | None,
        typer.Option(help="A host from which media may be fetched. Repeatable; default: none."),
    ] = None,
    llm_url: Annotated[
        str,
        typer.Option(
            help="Where another server (vllm serve DIR --enable-prompt-embeds) runs the LLM.",
            show_default="the LLM runs here",
        ),
    ] = "",
    llm_model: Annotated[
        str, typer.Option(help="The LLM's name there.", show_default="the only one")
    ] = "",
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
    _start(model, adapter or (), api_key or (), url_host or (), context.params)


def _start(
    model: Path,
    adapters: Sequence[str],
    api_keys: Sequence[str],
    url_hosts: Sequence[str],
    options: Mapping[str, Any],
) -> None:
    """Start the server with the options of the command line."""
    from onellm_dist.common.errors import UsageError
    from onellm_dist.common.extras import get_install_command

    try:
        from onellm_dist.model.adapters.adapter_set import parse_adapters
        from onellm_dist.serving.server.run import serve as run_server
        from onellm_dist.serving.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the package {error.name} is not installed",
            "the server needs it.",
            get_install_command("serve"),
        ) from None
    own = ("model", "name", "adapter", "api_key", "url_host")
    rest = {k: v for k, v in options.items() if k not in own}
    named = parse_adapters(adapters)
    settings = ServerSettings(
        name=options["name"] or model.resolve().name,
        api_keys=tuple(api_keys),
        llm_key=os.environ.get("ONELLM_LLM_API_KEY", ""),
        url_hosts=tuple(host.lower() for host in url_hosts),
        adapters=tuple(item.name for item in named),
        **rest,
    )
    run_server(model, settings, named)
