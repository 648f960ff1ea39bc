"""Fetching media from the hosts that the server trusts, and from no others."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from onellm_dist.serving.server.errors import RequestError

SECONDS = 20.0
"""Longest time for all files of a request: finding hosts, connecting, headers and content."""


class FetchBudget:
    """What the fetched files of one request may take together.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = most
        self._end = time.monotonic() + SECONDS

    @property
    def seconds(self) -> float:
        """Time that is left."""
        return max(0.0, self._end - time.monotonic())

    def spend(self, size: int) -> None:
        """Count bytes that came.

        Args:
            size: how many.

        Raises:
            RequestError: they are more than the request may fetch.
        """
        self._left -= size
        if self._left < 0:
            raise RequestError(
                f"the fetched files of the request are larger than {self._most >> 20} MiB together"
            )


class _Resolver(AbstractResolver):
    """Finds the addresses of hosts in threads of its own.

    A name server that is slow to answer holds up fetching alone, not the threads in which requests
    are read.

    Args:
        threads: where names are looked up.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        kind = socket.SOCK_STREAM
        found = await loop.run_in_executor(
            self._threads, socket.getaddrinfo, host, port, family, kind
        )
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=each,
                proto=protocol,
                flags=socket.AI_NUMERICHOST,
            )
            for each, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        return


def check_url(url: str, hosts: Sequence[str]) -> None:
    """Refuse a URL that is not of a trusted host.

    Args:
        url: the URL.
        hosts: names of trusted hosts, with a port where it is not the usual one.

    Raises:
        RequestError: it may not be fetched.
    """
    _parse_url(url, hosts)


def _parse_url(url: str, hosts: Sequence[str]) -> URL:
    """The address that may be opened, made of the parts that were checked."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        usual = {"http": 80, "https": 443}.get(parts.scheme)
        port = parts.port or usual
    except ValueError:
        raise RequestError("a URL of the request is not valid") from None
    name = (parts.hostname or "").lower()
    place = name if port == usual else f"{name}:{port}"
    if usual is None or parts.username or parts.password or place not in hosts or not name:
        raise RequestError(
            "this server does not fetch this URL; send the file as a data: URL "
            "(data:TYPE;base64,DATA)",
            code="url_not_allowed",
        )
    if not all("!" <= character <= "~" for character in url):
        raise RequestError("a URL of the request has characters that must be percent-encoded")
    # As it is written: signed URLs do not survive another encoding.
    return URL.build(
        scheme=parts.scheme,
        authority=f"[{name}]:{port}" if ":" in name else f"{name}:{port}",
        path=parts.path or "/",
        query_string=parts.query,
        encoded=True,
    )


async def fetch(url: str, hosts: Sequence[str], budget: FetchBudget, threads: Executor) -> bytes:
    """Fetch a file from a trusted host.

    Nothing waits for a host beyond the budget's time, be it for its address, a header or the next
    byte: the connection is closed then, and as soon as the caller is cancelled.

    Args:
        url: its URL.
        hosts: as of `check_url`.
        budget: what it and the other files of the request may take.
        threads: where the names of hosts are looked up.

    Raises:
        RequestError: it may not be fetched, cannot be, or is too large.
    """
    address = _parse_url(url, hosts)
    try:
        return await asyncio.wait_for(_read(address, budget, threads), budget.seconds)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
        raise RequestError("a file of the request cannot be fetched") from None


async def _read(address: URL, budget: FetchBudget, threads: Executor) -> bytes:
    data = bytearray()
    # No proxies, no redirects and nothing unpacked: what is read is what was checked and counted.
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=_Resolver(threads), use_dns_cache=False),
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(),
        ) as session,
        session.get(address, allow_redirects=False) as response,
    ):
        if not 200 <= response.status < 300:
            raise RequestError(f"a file of the request cannot be fetched: HTTP {response.status}")
        async for chunk in response.content.iter_any():
            budget.spend(len(chunk))
            data += chunk
    return bytes(data)
