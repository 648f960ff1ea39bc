"""What each user of the chat has said and attached; no user has anything of another."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onellm_dist.serving.server.chat import RunningChat


class ChatError(Exception):
    """What a user of the chat reads: what is wrong, and what to do."""


@dataclass(frozen=True)
class ChatMedium:
    """A medium of a question.

    Attributes:
        modality: its modality.
        files: the modality's part -> its file.
        picture: a picture of the model's input.
    """

    modality: str
    files: Mapping[str, Path]
    picture: Path

    @property
    def name(self) -> str:
        """Modality and names of the files, for people."""
        return f"{self.modality}: {', '.join(path.name for path in self.files.values())}"


@dataclass
class ChatTurn:
    """A question and its answer.

    Attributes:
        question: the text.
        media: what it is about.
        answer: what was answered so far.
        ending: how the answer ended; empty: it continues.
        prompt: the whole prompt, as the model continued it.
        seen: (picture, caption) of every span that the model saw.
    """

    question: str
    media: tuple[ChatMedium, ...]
    answer: str = ""
    ending: str = ""
    prompt: str = ""
    seen: list[tuple[Path, str]] = field(default_factory=list)


@dataclass
class ChatSession:
    """The conversation of one user.

    Attributes:
        turns: the turns so far.
        attached: media of the next question.
    """

    turns: list[ChatTurn] = field(default_factory=list)
    attached: list[ChatMedium] = field(default_factory=list)
    _work: asyncio.Task[Any] | None = None
    _running: RunningChat | None = None
    _stopped: bool = False

    @property
    def is_busy(self) -> bool:
        """Whether an answer is being prepared or written."""
        return self._work is not None or self._running is not None

    @property
    def was_stopped(self) -> bool:
        """Whether the user gave up the answer that is, or was last, being written."""
        return self._stopped

    def start_preparing(self, work: asyncio.Task[Any]) -> None:
        """Remember what prepares the next answer."""
        self._stopped = False
        self._work = work

    def start_answer(self, chat: RunningChat) -> None:
        """Remember the answer that is being written."""
        self._work = None
        self._running = chat

    def end_answer(self) -> None:
        """Give up what is prepared or written, if anything is, and forget it."""
        if self._work is not None:
            self._work.cancel()
        if self._running is not None:
            self._running.cancel()
        self._work = self._running = None

    def stop(self) -> None:
        """Give up the answer, as the user wants; what has come of it stays."""
        self._stopped = True
        if self._work is not None:
            self._work.cancel()
        if self._running is not None:
            self._running.cancel()


class ChatSessions:
    """The conversations of all users.

    Args:
        most: conversations that are kept; those unused for longest are dropped.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._sessions: OrderedDict[str, ChatSession] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str) -> ChatSession:
        """The conversation of a user, begun if there is none.

        Args:
            key: what identifies the user's page.
        """
        session = self._sessions.setdefault(key, ChatSession())
        self._sessions.move_to_end(key)
        while len(self._sessions) > self._most:
            self._sessions.popitem(last=False)[1].stop()
        return session

    def drop(self, key: str) -> None:
        """End the conversation of a user who has left or begins anew."""
        if session := self._sessions.pop(key, None):
            session.stop()
