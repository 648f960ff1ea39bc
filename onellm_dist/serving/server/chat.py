"""One request for a chat completion: from its messages to its answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.placeholders import mark_placeholders, remove_marks
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.media_text import MediaText
from onellm_dist.modalities import SPAN_TOKENS
from onellm_dist.model.generation.batched import Prompt
from onellm_dist.model.generation.media_cache import Medium
from onellm_dist.model.llm.positions import check_new_tokens, get_context
from onellm_dist.model.processing.content_parts import Conversation, HeldMedium, read_conversation
from onellm_dist.model.processing.media import read_bytes
from onellm_dist.model.processing.placed import needs_placing
from onellm_dist.serving.media import GivenFiles
from onellm_dist.serving.server.engine import make_deadline
from onellm_dist.serving.server.errors import RequestError, make_busy_error, make_late_error
from onellm_dist.serving.server.fetch import FetchBudget, check_url, fetch
from onellm_dist.serving.server.jobs import Ending, Event, Job, JobQueue, Piece, QueueFullError
from onellm_dist.serving.server.media import MediaReader, hash_files, to_files
from onellm_dist.serving.server.preparing import PreparationGate
from onellm_dist.serving.server.prompts import ServedFormat
from onellm_dist.serving.server.schema import ChatRequest, parse_request, read_json
from onellm_dist.serving.server.settings import ServerSettings

_CHARACTERS_OF_TOKEN = 64
"""More characters than any tokenizer makes one token of, but for blanks."""
_MOST_CHARACTERS = 4_000_000
"""Characters of the messages where the LLM takes texts of any length."""
_GRACE = 1.0
"""Seconds behind a request's deadline in which the engine may still say how it ended."""
_LARGE_BODY = 1 << 20
"""Bytes of a request that is read in turn even where it has no media: read, it takes several times
the memory. Texts alone are shorter."""


@dataclass(frozen=True)
class ChatService:
    """What requests are answered with.

    Attributes:
        model: a OneLLMForConditionalGeneration.
        text: how messages become text.
        media: decodes media.
        queue: where requests wait for the engine.
        gate: lets requests read their media.
        resolvers: threads that find the hosts of media.
        settings: the server's.
    """

    model: Any
    text: ServedFormat
    media: MediaReader
    queue: JobQueue
    gate: PreparationGate
    resolvers: ThreadPoolExecutor
    settings: ServerSettings

    async def prepare(self, body: bytes) -> RunningChat:
        """Read a request.

        Args:
            body: its JSON.

        Raises:
            RequestError: the request cannot be answered.
        """
        large = len(body) > _LARGE_BODY
        return await self._prepare(lambda: parse_request(read_json(body)), large=large)

    async def prepare_parsed(self, request: ChatRequest) -> RunningChat:
        """Read the media of a request, whose content parts may hold the bytes of files.

        Args:
            request: the request.

        Raises:
            RequestError: the request cannot be answered.
        """
        return await self._prepare(lambda: request, large=False)

    async def _prepare(self, parse: Callable[[], ChatRequest], *, large: bool) -> RunningChat:
        deadline = make_deadline(self.settings.request_seconds)
        try:
            if large:
                request, prompt = await self.gate.run(self._read_large(parse))
            else:
                request, text, media = await self._read_text(parse)
                # Texts alone wait for nobody's media.
                spans = await self.gate.run(self._read_media(media)) if media else []
                prompt = self._make_prompt(request, text, spans)
        except OneLLMError as error:
            raise RequestError.from_error(error) from None
        return RunningChat(self, request, prompt, deadline)

    async def _read_large(self, parse: Callable[[], ChatRequest]) -> tuple[ChatRequest, Prompt]:
        request, text, media = await self._read_text(parse)
        return request, self._make_prompt(request, text, await self._read_media(media))

    async def _read_text(
        self, parse: Callable[[], ChatRequest]
    ) -> tuple[ChatRequest, MediaText, list[HeldMedium]]:
        # In a thread: other answers continue while a large request is read.
        request, text, media = await asyncio.to_thread(self._read, parse)
        self._choose_length(request, len(text.ids) + SPAN_TOKENS * len(media))
        return request, text, media

    def _make_prompt(
        self, request: ChatRequest, text: MediaText, spans: Sequence[Sequence[Medium]]
    ) -> Prompt:
        count = sum(map(len, spans))
        most = self._choose_length(request, len(text.ids) + SPAN_TOKENS * count)
        placed = [(span, place) for number, place in text.media for span in spans[number]]
        return Prompt(
            ids=text.ids,
            media=[span for span, _ in placed],
            max_new_tokens=most,
            temperature=_choose(request.temperature, self.settings.temperature),
            top_p=_choose(request.top_p, 1.0),
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            places=[place for _, place in placed],
        )

    async def _read_media(self, media: list[HeldMedium]) -> list[list[Medium]]:
        """The spans of each medium."""
        budget = FetchBudget(self.settings.request_mb << 20)
        given = self._share_spans([await self._read_item(medium, budget) for medium in media])
        digests = await asyncio.to_thread(lambda: [hash_files(files) for files in given])
        spans = await self.media.read(given, digests)
        return [
            [
                Medium(files.modality, value, f"{digest} {number}", number)
                for number, value in enumerate(values)
            ]
            for files, digest, values in zip(given, digests, spans, strict=True)
        ]

    def _read(
        self, parse: Callable[[], ChatRequest]
    ) -> tuple[ChatRequest, MediaText, list[HeldMedium]]:
        """The request, its text, and its media."""
        request = parse()
        if request.model not in self.settings.model_names:
            known = ", ".join(map(repr, self.settings.model_names))
            raise RequestError(
                f"there is no model {request.model!r}; this server has {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        if request.logprobs and self.settings.llm_url:
            raise RequestError(
                "logprobs is not supported where another server runs the LLM", param="logprobs"
            )
        conversation = read_conversation(request.messages, marks=True)
        media = self._check_media(conversation)
        plain = [turn._replace(text=remove_marks(turn.text)) for turn in conversation.turns]
        context = get_context(self.model.config.text_config, self.model.llm_support)
        most = _MOST_CHARACTERS if context is None else context * _CHARACTERS_OF_TOKEN
        if sum(len(turn.text) for turn in plain) > most:
            raise RequestError(f"the messages have more than {most} characters")
        _refuse_placeholders(conversation, plain)
        placed = needs_placing(conversation, getattr(self.model.config, "spans", None) or {})
        names = [medium.modality for medium in media]
        turns = conversation.turns if placed else plain
        return request, self.text.encode(turns, names, placed=placed), media

    def _check_media(self, conversation: Conversation) -> list[HeldMedium]:
        """The media, `data:` URLs decoded.

        Raises:
            RequestError: the model does not read them, or their files would not be the client's.
            UsageError: a `data:` URL cannot be decoded.
        """
        if len(conversation.media) > self.settings.media:
            raise RequestError(
                f"{format_count(len(conversation.media), 'medium', 'media')}; this server takes "
                f"{self.settings.media} in a request"
            )
        known = self.model.config.modalities
        media: list[HeldMedium] = []
        for modality, item in conversation.media:
            if modality not in known:
                raise RequestError(
                    f"the model does not read {modality}; it reads {', '.join(known)}"
                )
            data = read_bytes(modality, item) if isinstance(item, str) else item
            if data is None:
                check_url(item, self.settings.url_hosts)
            media.append(HeldMedium(modality, item if data is None else data))
        return media

    async def _read_item(self, medium: HeldMedium, budget: FetchBudget) -> GivenFiles:
        modality, item = medium
        if isinstance(item, str):
            item = await fetch(item, self.settings.url_hosts, budget, self.resolvers)
        try:
            return to_files(modality, item)
        except TypeError as error:
            raise RequestError(f"{error}; send its file in base64") from None

    def _share_spans(self, given: list[GivenFiles]) -> list[GivenFiles]:
        """Let media take as many spans as in training; those of a modality share them."""
        most = getattr(self.model.config, "spans", None) or {}
        counts = Counter(files.modality for files in given)
        return [
            files._replace(most=max(1, most.get(files.modality, 1) // counts[files.modality]))
            for files in given
        ]

    def _choose_length(self, request: ChatRequest, positions: int) -> int:
        """The most new tokens behind a prompt of so many positions.

        Raises:
            RequestError: more are asked for than the server allows.
            UsageError: there is no room for them.
        """
        allowed = self.settings.max_new_tokens
        asked = request.most_tokens
        if asked is not None and asked > allowed:
            raise RequestError(
                f"max_tokens is {asked}; this server allows {allowed}", param="max_tokens"
            )
        context = get_context(self.model.config.text_config, self.model.llm_support)
        if asked is None and context is not None:
            asked = max(1, min(allowed, context - positions))
        most = allowed if asked is None else asked
        check_new_tokens(type(self.model.llm).__name__, context, positions, most)
        return most


def _refuse_placeholders(conversation: Conversation, plain: Sequence[ConversationTurn]) -> None:
    """Refuse texts that say where a medium stands, which would be read as words."""
    names = {modality for modality, _ in conversation.media}
    for turn in plain:
        if mark_placeholders(turn.text, names) != turn.text:
            raise RequestError(
                f"a message says <{'> or <'.join(sorted(names))}>: media stand where their content "
                "parts do, or before all text; leave it out"
            )


def _choose(asked: float | None, default: float) -> float:
    return default if asked is None else asked


class RunningChat:
    """A request that waits or is being answered.

    Args:
        service: what answers it.
        request: what was asked.
        prompt: what the model continues.
        deadline: `time.monotonic()` at which it is given up.
    """

    def __init__(
        self, service: ChatService, request: ChatRequest, prompt: Prompt, deadline: float
    ) -> None:
        self.request = request
        self.prompt = prompt
        self._service = service
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._job = Job(
            prompt,
            (*service.text.stops, *request.stops),
            (request.top_logprobs or 0) if request.logprobs else None,
            deadline,
            lambda event: _send(loop, self._events, event),
            "" if request.model == service.settings.name else request.model,
        )

    def start(self) -> None:
        """Let the request wait for its turn.

        Raises:
            RequestError: too many wait already.
        """
        try:
            self._service.queue.put(self._job)
        except QueueFullError:
            raise make_busy_error("too many requests wait") from None

    def cancel(self) -> None:
        """Give the request up: its client has left."""
        self._job.cancel()
        self._service.queue.discard(self._job)
        self._events.put_nowait(RequestError("the client left", status=499))

    async def read(self) -> AsyncIterator[Piece | Ending]:
        """Yield the answer as it comes; the last item is its ending.

        Raises:
            RequestError: it could not be answered.
        """
        left = max(self._job.deadline - time.monotonic(), 0)
        # One timer for all events: there is one for every token.
        timer = asyncio.get_running_loop().call_later(left + _GRACE, self._give_up)
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Ending):
                    return
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        """End a request that has had all its time."""
        self._events.put_nowait(make_late_error())
        self.cancel()


def _send(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Hand an event to the loop (from the engine's thread)."""
    try:
        loop.call_soon_threadsafe(events.put_nowait, event)
    except RuntimeError:  # the loop has ended, and its clients with it
        return
