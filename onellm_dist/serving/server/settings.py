"""The settings of a server, and their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from onellm_dist.common.errors import UsageError

FORMATS = ("auto", "chat", "conversation", "raw")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOOPBACK_HOSTS = ["127.0.0.1", "localhost", "[::1]", "::1"]
"""Names of this machine. By others a web page could reach a server here, if it lets them point
here."""


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        name: the model's name in requests.
        host: address that is listened on.
        port: port; 0: a free one.
        api_keys: keys of which a request must have one; empty: none is asked for.
        prompt_format: one of FORMATS: how messages become text.
        batch: most requests that are answered together.
        queue: most requests that wait.
        max_new_tokens: tokens of an answer where a request names no number, and the most it may.
        temperature: temperature where a request names none; 0: greedy.
        request_mb: largest body of a request, and most that it may fetch, in MiB.
        bodies_mb: most memory for the bodies of all requests that are under way, in MiB; one
            of `request_mb` fits in any case.
        media: most media of a request.
        media_seconds: CPU time that one medium may take to decode.
        media_mb: memory that one medium may take to decode, in MiB.
        readers: processes that decode media.
        preparing: most requests whose media are read at once; as many as `queue` may wait for it.
        prepare_seconds: longest time for that, and longest wait for it.
        request_seconds: longest time from a request to the end of its answer.
        receive_seconds: longest time in which a request's body must have come.
        connections: most open connections.
        requests_per_minute: requests of one key or address; 0: any number.
        llm_url: address of the server that runs the LLM; empty: it runs here.
        llm_model: the LLM's name there; empty: the only one.
        llm_key: key of that server.
        url_hosts: hosts from which media are fetched; empty: none is fetched.
        adapters: names of adapters, by which requests choose one in place of the model.
    """

    name: str = "onellm"
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    prompt_format: str = "auto"
    batch: int = 16
    queue: int = 256
    max_new_tokens: int = 512
    temperature: float = 0.0
    request_mb: int = 64
    bodies_mb: int = 2048
    media: int = 16
    media_seconds: float = 20.0
    media_mb: int = 1500
    readers: int = 2
    preparing: int = 8
    prepare_seconds: float = 120.0
    request_seconds: float = 600.0
    receive_seconds: float = 30.0
    connections: int = 512
    requests_per_minute: int = 0
    llm_url: str = ""
    llm_model: str = ""
    llm_key: str = ""
    url_hosts: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt_format not in FORMATS:
            raise UsageError(
                f"--format {self.prompt_format}",
                "there is no such prompt format.",
                f"use one of: {', '.join(FORMATS)}.",
            )
        if self.llm_url and urlsplit(self.llm_url).scheme not in ("http", "https"):
            raise UsageError(
                f"--llm-url {self.llm_url}",
                "it is not the address of a server.",
                "give one such as http://127.0.0.1:8001/v1.",
            )
        if self.name in self.adapters:
            raise UsageError(
                f"--adapter {self.name} has the name of the model",
                "requests choose by the name.",
                "give one of them another name; the model's is --name.",
            )
        if self.adapters and self.llm_url:
            raise UsageError(
                "--adapter together with --llm-url",
                "the LLM runs elsewhere, without the adapters.",
                "merge an adapter (onellm convert adapter), and serve the merged model there.",
            )
        if self.host not in LOOPBACK and not self.api_keys:
            raise UsageError(
                f"--host {self.host} without a key",
                "anyone who reaches this machine could use the model.",
                "set ONELLM_API_KEY, or listen on 127.0.0.1 behind a proxy that asks for one and "
                "sends `Host: 127.0.0.1`.",
            )
        if any(not key.isascii() or not key.strip() for key in self.api_keys):
            raise UsageError(
                "an API key is empty or has characters that a header cannot carry",
                "no request could give it.",
                "use ASCII letters and digits.",
            )

    @property
    def model_names(self) -> tuple[str, ...]:
        """What requests may name: the model, and each adapter."""
        return (self.name, *self.adapters)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK
