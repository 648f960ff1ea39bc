"""Answers the users of a chat by the engine of the server."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.logging import get_logger
from onellm_dist.modalities import get_modality
from onellm_dist.model.generation.media_cache import Medium
from onellm_dist.serving.chat.messages import describe_prompt, make_messages, read_medium
from onellm_dist.serving.chat.pictures import draw_spans, save_picture
from onellm_dist.serving.chat.session import ChatError, ChatMedium, ChatSession, ChatTurn
from onellm_dist.serving.media import GivenFiles
from onellm_dist.serving.server.chat import ChatService, RunningChat
from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.jobs import Ending
from onellm_dist.serving.server.schema import parse_request

_log = get_logger(__name__)
_PAUSE = 0.05
"""Seconds between two states of an answer that are shown."""
_STOPPED_EARLY = "Stopped before the answer began."
_ENDINGS = {"stop": "complete", "length": "cut: the longest answer was reached"}


@dataclass(frozen=True)
class ChatOptions:
    """How an answer is made.

    Attributes:
        system: what the model reads before all turns; empty: nothing.
        max_tokens: most tokens of the answer.
        temperature: 0: greedy.
        top_p: probability mass of the nucleus.
        seed: seed of the sampling; None: another one each time.
        stop: strings at which the answer ends.
    """

    system: str = ""
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class ChatDesk:
    """Reads media, and asks the model.

    Args:
        service: the server's.
        folder: where pictures are written.
    """

    def __init__(self, service: ChatService, folder: Path) -> None:
        self._service = service
        self._folder = folder
        self._spans: dict[str, int] = getattr(service.model.config, "spans", None) or {}

    @property
    def modalities(self) -> list[str]:
        """What the model reads."""
        return list(self._service.model.config.modalities)

    async def attach(self, session: ChatSession, modality: str, files: Mapping[str, Path]) -> None:
        """Read a medium, and attach it to the next question.

        Args:
            session: the user's.
            modality: the medium's.
            files: the modality's part -> its file.

        Raises:
            ChatError: it cannot be read, or there are too many; nothing is attached.
        """
        most = self._service.settings.media
        count = len(session.attached) + sum(len(turn.media) for turn in session.turns)
        if count >= most:
            raise ChatError(
                f"This conversation has {format_count(count, 'medium', 'media')}, and may have "
                f"{most}. Start a new one."
            )
        with _Words():
            parts = get_modality(modality).required_parts
            if missing := [part for part in parts if part not in files]:
                raise ChatError(
                    f"{modality} is read from {' and '.join(parts)}: choose a file for "
                    f"{' and '.join(missing)}."
                )
            medium = ChatMedium(modality, dict(files), self._folder)
            content = await asyncio.to_thread(read_medium, medium)
            self._check_size(content)
            names = {part: path.name for part, path in files.items()}
            given = GivenFiles(modality, content, self._spans.get(modality, 1), names)
            (value,) = await self._service.gate.run(self._service.media.read([given]))
            picture = await asyncio.to_thread(self._draw, modality, list(value))
        session.attached.append(dataclasses.replace(medium, picture=picture))

    def _check_size(self, content: Mapping[str, bytes]) -> None:
        size, most = sum(map(len, content.values())), self._service.settings.request_mb
        if size > most << 20:
            raise ChatError(f"It has {size / 2**20:.0f} MiB; {most} MiB are read at most.")

    def _draw(self, modality: str, values: list[Any]) -> Path:
        return save_picture(self._folder, draw_spans(modality, values))

    async def ask(
        self, session: ChatSession, question: str, options: ChatOptions
    ) -> AsyncGenerator[ChatTurn, None]:
        """Ask a question about what is attached.

        Args:
            session: the user's; it has a turn more as soon as the answer begins.
            question: the text.
            options: how the answer is made.

        Yields:
            The turn, whenever there is more of its answer.

        Raises:
            ChatError: it cannot be asked; what was attached stays so.
        """
        if not question.strip() and not session.attached:
            raise ChatError("Write a question, or attach a medium.")
        turn = ChatTurn(question, tuple(session.attached))
        async with aclosing(self._answer(session, session.turns, turn, options)) as states:
            async for state in states:
                yield state

    async def ask_again(
        self, session: ChatSession, options: ChatOptions
    ) -> AsyncGenerator[ChatTurn, None]:
        """Ask the last question once more; the new turn takes the old one's place.

        Args:
            session: the user's.
            options: how the answer is made.

        Yields:
            As `ask`.

        Raises:
            ChatError: it cannot be asked; the old turn stays.
        """
        if not session.turns:
            raise ChatError("Nothing was asked yet.")
        *earlier, last = session.turns
        turn = ChatTurn(last.question, last.media)
        async with aclosing(self._answer(session, earlier, turn, options)) as states:
            async for state in states:
                yield state

    async def _answer(
        self, session: ChatSession, earlier: list[ChatTurn], turn: ChatTurn, options: ChatOptions
    ) -> AsyncGenerator[ChatTurn, None]:
        if session.is_busy:
            raise ChatError("An answer is being written. Stop it first.")
        try:
            with _Words():
                chat = await self._prepare(session, [*earlier, turn], options)
                await self._describe(turn, chat)
                if session.was_stopped:
                    raise ChatError(_STOPPED_EARLY)
                chat.start()
            session.start_answer(chat)
            session.turns = [*earlier, turn]
            used = {id(medium) for medium in turn.media}
            session.attached = [each for each in session.attached if id(each) not in used]
            yield turn
            async for shown in self._read_answer(session, turn, chat):
                yield shown
        finally:
            session.end_answer()

    async def _prepare(
        self, session: ChatSession, turns: list[ChatTurn], options: ChatOptions
    ) -> RunningChat:
        work = asyncio.create_task(self._prepare_turns(turns, options))
        session.start_preparing(work)
        try:
            return await work
        except asyncio.CancelledError:
            if not session.was_stopped:
                raise  # nobody waits for the answer any more
            raise ChatError(_STOPPED_EARLY) from None

    async def _prepare_turns(self, turns: list[ChatTurn], options: ChatOptions) -> RunningChat:
        settings = self._service.settings
        messages = await asyncio.to_thread(
            make_messages, options.system, turns, settings.request_mb
        )
        fields = {
            "model": settings.name,
            "messages": messages,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": secrets.randbits(31) if options.seed is None else options.seed,
            "stop": list(options.stop) or None,
        }
        return await self._service.prepare_parsed(parse_request(fields))

    async def _describe(self, turn: ChatTurn, chat: RunningChat) -> None:
        """Note what the model continues and sees."""

        def describe() -> None:
            turn.prompt = describe_prompt(self._service.text.tokenizer, chat.prompt)
            for name, values in _group_spans(chat.prompt.media):
                count = f", {len(values)} spans" if len(values) > 1 else ""
                turn.seen.append((self._draw(name, values), f"{name}{count}"))

        await asyncio.to_thread(describe)

    async def _read_answer(
        self, session: ChatSession, turn: ChatTurn, chat: RunningChat
    ) -> AsyncIterator[ChatTurn]:
        began = shown = time.monotonic()
        try:
            async for item in chat.read():
                now = time.monotonic()
                if isinstance(item, Ending):
                    turn.ending = (
                        f"{_ENDINGS[item.reason]}; {format_count(item.tokens, 'token')} in "
                        f"{now - began:.1f} s, "
                        f"seed {chat.prompt.seed}"
                    )
                else:
                    turn.answer += item.text
                if isinstance(item, Ending) or now - shown > _PAUSE:
                    shown = now
                    yield turn
        except RequestError as error:
            turn.ending = "stopped" if session.was_stopped else error.message
            yield turn


def _group_spans(spans: Sequence[Medium]) -> list[tuple[str, list[Any]]]:
    """Modality and values of each medium of a prompt, whose keys end in a span's number."""
    groups: list[tuple[str, list[Any]]] = []
    for span in spans:
        if (span.key or "").endswith(" 0"):
            groups.append((span.modality, []))
        groups[-1][1].append(span.value)
    return groups


class _Words:
    """Turns what goes wrong into words for the user."""

    def __enter__(self) -> None:
        return

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, RequestError):
            raise ChatError(error.message) from None
        if isinstance(error, OneLLMError):
            said = RequestError.from_error(error).message
            raise ChatError(said) from None
        if isinstance(error, Exception) and not isinstance(error, ChatError):
            _log.error("a chat failed", exc_info=error)
            raise ChatError("This failed; the log of `onellm chat` says why.") from None
