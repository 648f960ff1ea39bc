"""Fetching media from the hosts that the server trusts, and from no others."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from onellm_dist.serving.server.errors import RequestError

SECONDS = 20.0
"""Longest wait for a host, and for all files of a request."""
_CHUNK = 1 << 16


class FetchBudget:
    """What the fetched files of one request may take together.

    Args:
        most: bytes.
        seconds: time.
    """

    def __init__(self, most: int, seconds: float | None = None) -> None:
        self._most = most
        self._left = most
        self._end = time.monotonic() + (SECONDS if seconds is None else seconds)
        self._closed = False

    def spend(self, size: int) -> None:
        """Count bytes that came.

        Args:
            size: how many.

        Raises:
            RequestError: they are more than the request may fetch.
            TimeoutError: its time is over, or nobody waits for the request.
        """
        self._left -= size
        if self._left < 0:
            raise RequestError(
                f"the fetched files of the request are larger than {self._most >> 20} MiB together"
            )
        if self._closed or time.monotonic() > self._end:
            raise TimeoutError

    def close(self) -> None:
        """Stop what is still being fetched (from any thread)."""
        self._closed = True


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead to a host that is not trusted."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def check_url(url: str, hosts: Sequence[str]) -> None:
    """Refuse a URL that is not of a trusted host.

    Args:
        url: the URL.
        hosts: names of trusted hosts, with a port where it is not the usual one.

    Raises:
        RequestError: it may not be fetched.
    """
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


def fetch(url: str, hosts: Sequence[str], budget: FetchBudget) -> bytes:
    """Fetch a file from a trusted host.

    Args:
        url: its URL.
        hosts: as of `check_url`.
        budget: what it and the other files of the request may take.

    Raises:
        RequestError: it may not be fetched, cannot be, or is too large.
    """
    check_url(url, hosts)
    # No proxies and no other protocols: what is opened is what was checked.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _NoRedirects(),
    ):
        opener.add_handler(handler)
    data = bytearray()
    try:
        budget.spend(0)
        with opener.open(url, timeout=SECONDS) as response:
            while chunk := response.read1(_CHUNK):
                budget.spend(len(chunk))
                data += chunk
    except urllib.error.HTTPError as error:
        raise RequestError(f"a file of the request cannot be fetched: HTTP {error.code}") from None
    except (OSError, ValueError, http.client.HTTPException):
        raise RequestError("a file of the request cannot be fetched") from None
    return bytes(data)
