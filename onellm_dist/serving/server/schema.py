"""Requests as OpenAI has them: what is read, what is accepted without effect, what is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from onellm_dist.serving.server.errors import RequestError

Number = Annotated[float, Field(allow_inf_nan=False)]
_WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_k": (-1, 0),
    "best_of": (1,),
    "echo": (False,),
}
"""Options that this server does not have, and the values that ask for nothing."""


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool = False


class ChatRequest(BaseModel):
    """A request for a chat completion."""

    model_config = ConfigDict(extra="allow", strict=False)
    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=10)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]
        | None
    ) = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _refuse_unknown(self) -> ChatRequest:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _WITHOUT_EFFECT:
                continue
            if value not in _NEUTRAL.get(name, ()):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings at which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the answer, as asked for."""
        return self.max_completion_tokens or self.max_tokens


def read_json(body: bytes) -> Any:
    """The JSON of a body.

    Raises:
        RequestError: it is none.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def parse_request(content: Any) -> ChatRequest:
    """Parse the JSON of a request.

    Raises:
        RequestError: it is not such a request; the message names the first field that is wrong.
    """
    try:
        return ChatRequest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = str(first["msg"]).removeprefix("Value error, ")
        raise RequestError(f"{place}: {message}" if place else message, param=place) from None
    except RecursionError:
        raise RequestError("the request is nested too deep") from None
