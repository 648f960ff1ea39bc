"""What the page of the chat does."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr

from onellm_dist.serving.chat.desk import ChatDesk, ChatOptions
from onellm_dist.serving.chat.examples import make_example
from onellm_dist.serving.chat.layout import (
    ChatWidgets,
    build_widgets,
    describe_file,
    list_file_parts,
)
from onellm_dist.serving.chat.pictures import KEPT_SECONDS
from onellm_dist.serving.chat.session import ChatError, ChatSession, ChatSessions, ChatTurn
from onellm_dist.serving.chat.uploads import is_upload
from onellm_dist.serving.server.settings import ServerSettings

_CLEANING_SECONDS = 600


class ChatPage:
    """The page, for any number of users.

    Args:
        desk: answers.
        settings: the server's.
        prompt_format: how messages become text.
        folder: where the files of examples are written.
        uploads: where Gradio keeps the files of users.
    """

    def __init__(
        self,
        desk: ChatDesk,
        settings: ServerSettings,
        prompt_format: str,
        folder: Path,
        uploads: Path,
    ) -> None:
        self.sessions = ChatSessions()
        self._desk = desk
        self._folder = folder
        self._uploads = uploads
        with gr.Blocks(
            title=f"{settings.name} (onellm chat)",
            analytics_enabled=False,
            delete_cache=(_CLEANING_SECONDS, KEPT_SECONDS),
        ) as self.blocks:
            self._widgets = build_widgets(settings.name, desk.modalities, settings, prompt_format)
            self._connect(self._widgets)
        self.blocks.queue(default_concurrency_limit=None, max_size=1024)

    def _connect(self, w: ChatWidgets) -> None:
        """Say what each widget does."""
        plain = {"show_progress": "hidden", "api_visibility": "private"}
        asked = [w.question, w.modality, *w.files, *w.options]
        shown = [w.conversation, w.status, w.question, w.seen, w.prompt, w.send, w.stop, *w.files]
        media = [w.seen, w.status, *w.files]
        gr.on([w.send.click, w.question.submit], self._ask, asked, shown, **plain)
        w.again.click(self._ask_again, w.options, shown, **plain)
        w.stop.click(self._stop, None, None, queue=False, **plain)
        emptied = [w.conversation, w.status, w.seen, w.prompt, *w.files]
        gr.on([w.clear.click, w.conversation.clear], self._clear, None, emptied, **plain)
        w.modality.change(self._choose, w.modality, w.files, **plain)
        w.attach.click(self._attach, [w.modality, *w.files], media, **plain)
        w.detach.click(self._detach, None, media, **plain)
        for name, button in w.examples.items():
            button.click(self._make_example(name), None, [*media, w.question], **plain)
        self.blocks.unload(self._leave)

    async def _ask(self, request: gr.Request, *given: Any) -> AsyncGenerator[list[Any], None]:
        session = self._get_session(request)
        question, modality, *rest = given
        count = len(self._widgets.files)
        files, options = rest[:count], rest[count:]
        if any(files):
            try:
                await self._desk.attach(
                    session, modality, _name_files(modality, files, self._uploads)
                )
            except ChatError as error:  # the files stay, to be corrected
                yield self._show_error(session, error, [gr.update()] * count)
                return
        answer = self._desk.ask(session, question, _make_options(options))
        async with aclosing(self._follow(request, session, answer)) as states:
            async for state in states:
                yield state

    async def _ask_again(
        self, request: gr.Request, *options: Any
    ) -> AsyncGenerator[list[Any], None]:
        session = self._get_session(request)
        answer = self._desk.ask_again(session, _make_options(list(options)))
        async with aclosing(self._follow(request, session, answer)) as states:
            async for state in states:
                # What is being written stays, and so do files that are not attached yet.
                yield [*state[:2], gr.update(), *state[3:7], *[gr.update()] * len(state[7:])]

    async def _follow(
        self, request: gr.Request, session: ChatSession, answer: AsyncGenerator[ChatTurn, None]
    ) -> AsyncGenerator[list[Any], None]:
        """What an answer changes on the page, as it comes."""
        try:
            async with aclosing(answer):
                async for turn in answer:
                    yield self._show(request, session, turn)
        except ChatError as error:
            yield self._show_error(session, error, [None] * len(self._widgets.files))

    def _show_error(self, session: ChatSession, error: ChatError, files: list[Any]) -> list[Any]:
        return [
            _show_turns(session.turns),
            _write_status(str(error), "error"),
            gr.update(),
            _show_attached(session) if session.attached else gr.update(),
            gr.update(),
            *_toggle(session.is_busy),
            *files,
        ]

    def _show(self, request: gr.Request, session: ChatSession, turn: ChatTurn) -> list[Any]:
        """All that a turn changes on the page."""
        empty = [None] * len(self._widgets.files)
        if self._get_session(request) is not session:  # a new conversation was begun
            return [[], "", "", [], "", *_toggle(False), *empty]
        going = not turn.ending
        return [
            _show_turns(session.turns),
            _write_status("answering…" if going else turn.ending, "going" if going else "done"),
            "",
            [(str(path), caption) for path, caption in turn.seen],
            turn.prompt,
            *_toggle(going),
            *empty,
        ]

    async def _stop(self, request: gr.Request) -> None:
        self._get_session(request).stop()

    async def _clear(self, request: gr.Request) -> list[Any]:
        self.sessions.drop(_get_key(request))
        return [[], "", [], "", *[None] * len(self._widgets.files)]

    async def _choose(self, modality: str) -> list[Any]:
        return [
            gr.update(**describe_file(modality, number))
            for number in range(len(self._widgets.files))
        ]

    async def _attach(self, request: gr.Request, modality: str, *files: Any) -> list[Any]:
        session = self._get_session(request)
        try:
            if not any(files):
                raise ChatError("Choose a file first.")
            await self._desk.attach(session, modality, _name_files(modality, files, self._uploads))
        except ChatError as error:
            kept = [gr.update()] * len(files)
            return [gr.update(), _write_status(str(error), "error"), *kept]
        return [_show_attached(session), _describe_attached(session), *[None] * len(files)]

    async def _detach(self, request: gr.Request) -> list[Any]:
        session = self._get_session(request)
        session.attached.clear()
        empty = [None] * len(self._widgets.files)
        return [[], _write_status("Nothing is attached.", "done"), *empty]

    def _make_example(self, modality: str) -> Any:
        """What the button of an example does."""

        async def show_example(request: gr.Request) -> list[Any]:
            session = self._get_session(request)
            empty = [None] * len(self._widgets.files)
            try:
                example = await asyncio.to_thread(make_example, modality, self._folder)
                await self._desk.attach(session, modality, example.files)
            except ChatError as error:
                return [gr.update(), _write_status(str(error), "error"), *empty, gr.update()]
            shown = [_show_attached(session), _describe_attached(session)]
            return [*shown, *empty, example.question]

        return show_example

    def _leave(self, request: gr.Request) -> None:
        """End the conversation of a page that was closed: nobody waits for its answer."""
        self.sessions.drop(_get_key(request))

    def _get_session(self, request: gr.Request) -> ChatSession:
        return self.sessions.get(_get_key(request))


def _get_key(request: gr.Request) -> str:
    return str(request.session_hash)


def _name_files(modality: str, files: Any, uploads: Path) -> dict[str, Path]:
    """The modality's part -> its file, of those that were chosen.

    Raises:
        ChatError: a file is not one that was uploaded.
    """
    names = [part for part, _ in list_file_parts(modality)]
    found = {part: Path(file) for part, file in zip(names, files, strict=False) if file}
    if not all(is_upload(path, uploads) for path in found.values()):
        raise ChatError("Files are read only where they were uploaded; choose the file again.")
    return found


def _make_options(given: list[Any]) -> ChatOptions:
    system, tokens, temperature, top_p, seed, stops = given
    return ChatOptions(
        system=str(system or ""),
        max_tokens=int(tokens),
        temperature=float(temperature),
        top_p=float(top_p),
        seed=None if seed is None else int(seed),
        stop=tuple(line for line in str(stops or "").splitlines() if line),
    )


def _show_turns(turns: list[ChatTurn]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in turns:
        for medium in turn.media:
            content = {"path": str(medium.picture), "alt_text": medium.name}
            messages += [
                {"role": "user", "content": content},
                {"role": "user", "content": _escape(medium.name)},
            ]
        if turn.question:
            messages.append({"role": "user", "content": _escape(turn.question)})
        if turn.answer or turn.ending:
            messages.append({"role": "assistant", "content": _escape(turn.answer) or "(empty)"})
    return messages


def _escape(text: str) -> str:
    """Text of which Gradio shows the tags too: it takes all text of a message as HTML."""
    return html.escape(text, quote=False)


def _show_attached(session: ChatSession) -> list[tuple[str, str]]:
    return [(str(medium.picture), medium.name) for medium in session.attached]


def _describe_attached(session: ChatSession) -> str:
    names = ", ".join(medium.name for medium in session.attached)
    return _write_status(f"Attached: {names}", "done")


def _write_status(text: str, kind: str) -> str:
    role = "alert" if kind == "error" else "status"
    colour = "color: var(--error-text-color)" if kind == "error" else ""
    return f'<div role="{role}" class="{kind}" style="{colour}">{html.escape(text)}</div>'


def _toggle(going: bool) -> list[Any]:
    """Send and Stop while an answer is written, or not."""
    return [gr.update(interactive=not going), gr.update(interactive=going)]
