"""Errors of requests, as OpenAI's clients read them."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from onellm_dist.common.errors import MachineError, OneLLMError
from onellm_dist.common.logging import get_logger

_log = get_logger(__name__)


class RequestError(Exception):
    """A request that is refused, with its status.

    Args:
        message: what is wrong, and what to do.
        status: HTTP status.
        kind: `type` of OpenAI's error.
        param: the field that is wrong.
        code: `code` of OpenAI's error.
        headers: headers of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str = "",
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    @classmethod
    def from_error(cls, error: OneLLMError) -> RequestError:
        """Say an error of this package in one line, without paths of this machine."""
        message = "; ".join(line.rstrip(".") for line in (error.what, error.why, error.do) if line)
        if isinstance(error, MachineError):
            return cls(message, status=503, kind="server_error", headers={"Retry-After": "1"})
        if type(error) is OneLLMError:  # neither the request nor a medium is at fault
            return cls(message, status=500, kind="server_error")
        return cls(message)

    @property
    def content(self) -> dict[str, Any]:
        """The JSON of the error."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param or None,
                "code": self.code,
            }
        }

    def to_response(self) -> Response:
        """The response that a client gets."""
        return make_json(self.content, self.status, self.headers)


def make_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: halves of surrogate pairs that a client sent can be sent back.

    Args:
        content: what is sent.
        status: HTTP status.
        headers: headers of the response.
    """
    text = json.dumps(content, ensure_ascii=True, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def make_busy_error(what: str) -> RequestError:
    """The error for a request that may be tried again later."""
    return RequestError(
        f"{what}; try again later",
        status=429,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def make_late_error() -> RequestError:
    """The error for a request that took too long."""
    return RequestError(
        "the answer took longer than this server allows", status=504, kind="timeout_error"
    )


def describe_error(error: Exception) -> RequestError:
    """What a client gets for an error; if it is not an OneLLMError, the log has its traceback."""
    if isinstance(error, OneLLMError):
        return RequestError.from_error(error)
    _log.error("a request failed", exc_info=error)
    return make_internal_error()


def make_internal_error() -> RequestError:
    """The error for a fault of the server; its log has the traceback."""
    return RequestError(
        "the server failed on this request; its log says why", status=500, kind="server_error"
    )
