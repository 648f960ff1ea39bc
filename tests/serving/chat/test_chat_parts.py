"""The chat without its page: conversations, pictures of what is seen, prompts, words for errors."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served_model as served
from PIL import Image

from onellm_dist.cli.chat import chat as chat_command
from onellm_dist.common.errors import UsageError
from onellm_dist.data.text import HEADER
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.serving.chat.desk import ChatDesk, ChatOptions
from onellm_dist.serving.chat.examples import list_examples, make_example
from onellm_dist.serving.chat.messages import make_messages
from onellm_dist.serving.chat.pictures import KEPT_SECONDS, save_picture
from onellm_dist.serving.chat.session import (
    ChatError,
    ChatMedium,
    ChatSession,
    ChatSessions,
    ChatTurn,
)
from onellm_dist.serving.generate import build_prompt
from onellm_dist.serving.server.run import build_service
from onellm_dist.serving.server.settings import ServerSettings

MODEL = served.make_model()
FILES = served.make_files()
SHORT = ChatOptions(max_tokens=12)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatDesk]:
    settings = ServerSettings(
        name="toy", readers=1, media=9, request_mb=1, prompt_format="conversation"
    )
    service, engine, _ = build_service(MODEL, load_toy_tokenizer(), settings)
    engine.start()
    yield ChatDesk(service, tmp_path_factory.mktemp("pictures"))
    engine.close()
    service.media.close()


def write_files(folder: Path, modality: str) -> dict[str, Path]:
    """The files of a medium, by the modality's parts."""
    content = FILES[modality]
    parts = content if isinstance(content, dict) else {modality: content}
    paths = {part: folder / f"{modality}-{part}.bin" for part in parts}
    for part, path in paths.items():
        path.write_bytes(parts[part])
    return paths


async def ask(
    desk: ChatDesk, session: ChatSession, question: str, options: ChatOptions = SHORT
) -> ChatTurn:
    async for _ in desk.ask(session, question, options):
        pass
    return session.turns[-1]


@pytest.mark.seconds
def test_all_modalities_are_answered_as_by_generate(desk: ChatDesk, tmp_path: Path) -> None:
    async def check() -> None:
        joint = ChatSession()
        for name in FILES:
            alone = ChatSession()
            for session in (alone, joint):
                await desk.attach(session, name, write_files(tmp_path, name))
            turn = await ask(desk, alone, "What is it?")
            wanted = served.compute_answer(MODEL, "What is it?", {name: FILES[name]})
            assert turn.answer == wanted and "tokens in" in turn.ending
            ((picture, caption),) = turn.seen
            assert caption == name and picture == turn.media[0].picture
            assert f"⟨{name}: 32 positions⟩" in turn.prompt and turn.prompt.endswith("Assistant:")
        turn = await ask(desk, joint, "What is it?")
        assert turn.answer == served.compute_answer(MODEL, "What is it?", FILES)
        assert [caption for _, caption in turn.seen] == list(FILES)

    asyncio.run(check())


@pytest.mark.seconds
def test_several_turns_of_two_users_at_once(desk: ChatDesk, tmp_path: Path) -> None:
    pictures = {}
    for number in range(2):
        pictures[number] = tmp_path / f"{number}.png"
        pictures[number].write_bytes(served.make_picture(number))

    async def talk(number: int) -> ChatSession:
        session = ChatSession()
        await desk.attach(session, "image", {"image": pictures[number]})
        await ask(desk, session, "What?")
        await desk.attach(session, "image", {"image": pictures[1 - number]})
        await ask(desk, session, "And this?")
        return session

    async def check() -> list[ChatSession]:
        return list(await asyncio.gather(talk(0), talk(1)))

    sessions = asyncio.run(check())
    assert sessions[0].turns[1].answer != sessions[1].turns[1].answer
    for number, session in enumerate(sessions):
        first, second = session.turns
        assert first.answer == served.compute_answer(
            MODEL, "What?", {"image": served.make_picture(number)}
        )
        text = build_prompt("<image>And this?", "conversation").removeprefix(HEADER)
        text = build_prompt("<image>What?", "conversation") + f" {first.answer}\n" + text
        order = [served.make_picture(number), served.make_picture(1 - number)]
        assert second.answer == served.compute_placed(MODEL, text, order)
        assert second.prompt.count("⟨image: 32 positions⟩") == 2
        assert second.prompt.index("Human") < second.prompt.index("⟨image") < len(second.prompt)


def test_a_stopped_answer_keeps_what_has_come(desk: ChatDesk) -> None:
    async def check() -> None:
        session = ChatSession()
        long = replace(SHORT, max_tokens=300, stop=("never so",))
        asking = desk.ask(session, "What?", long)
        turn = await asking.__anext__()
        with pytest.raises(ChatError, match="Stop it first"):
            await ask(desk, session, "And?")
        while not turn.answer:
            await asking.__anext__()
        session.stop()
        began = time.monotonic()
        async for _ in asking:
            pass
        assert turn.ending == "stopped" and turn.answer and time.monotonic() - began < 1
        assert not session.is_busy
        again = await ask(desk, session, "What else?")  # the partial answer is part of the talk
        assert f"{turn.answer}\n" in again.prompt and again.ending.startswith("cut")

        left = ChatSession()
        leaving = desk.ask(left, "What?", long)
        await leaving.__anext__()
        await leaving.aclose()  # the page was closed
        assert not left.is_busy

    asyncio.run(check())


@pytest.mark.seconds
def test_seeds_and_what_ends_answers(desk: ChatDesk) -> None:
    hot = replace(SHORT, temperature=1.5, max_tokens=24)

    async def draw(options: ChatOptions) -> ChatTurn:
        return await ask(desk, ChatSession(), "What?", options)

    async def check() -> None:
        first, again, other = [await draw(replace(hot, seed=seed)) for seed in (1, 1, 2)]
        assert first.answer == again.answer != other.answer and "seed 1" in first.ending
        free = [await draw(hot) for _ in range(2)]
        assert free[0].answer != free[1].answer
        seed = int(free[0].ending.rsplit(" ", 1)[1])
        assert (await draw(replace(hot, seed=seed))).answer == free[0].answer
        session = ChatSession()
        await ask(desk, session, "What?", hot)
        async for _ in desk.ask_again(session, replace(hot, seed=1)):
            pass
        assert [turn.answer for turn in session.turns] == [first.answer]
        with pytest.raises(ChatError, match="Nothing was asked"):
            await desk.ask_again(ChatSession(), hot).__anext__()
        system = await draw(replace(SHORT, system="Be brief."))
        assert "Be brief.\n\n" in system.prompt and HEADER not in system.prompt
        whole = (await draw(SHORT)).answer
        cut = await draw(replace(SHORT, stop=(whole[3:6],)))
        assert cut.answer == whole.split(whole[3:6])[0].strip()
        assert cut.ending.startswith("complete")

    asyncio.run(check())


def test_bad_files_are_refused_in_words_and_nothing_is_lost(desk: ChatDesk, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * (1 << 20) + b"x")
    good = write_files(tmp_path, "depth")
    cases: list[tuple[str, dict[str, Path], str]] = [
        ("image", {"image": broken}, r"^image broken\.png: broken\.png \(10 bytes\) is not"),
        ("audio", {"audio": broken}, r"^audio broken\.png: broken\.png "),
        ("image", {"image": large}, "1 MiB are read at most"),
        ("image", {"image": tmp_path / "gone.png"}, "gone.png cannot be read"),
        ("depth", {"depth": good["depth"]}, "choose a file for image"),
        ("smell", {"smell": broken}, "smell"),
    ]

    async def check() -> None:
        session = ChatSession()
        await desk.attach(session, "imu", write_files(tmp_path, "imu"))
        for modality, files, says in cases:
            with pytest.raises(ChatError, match=says) as error:
                await desk.attach(session, modality, files)
            assert "Traceback" not in str(error.value) and len(session.attached) == 1
        for question, options, says in (
            ("What <imu>?", SHORT, "says <imu>"),
            ("word " * 2000, SHORT, "positions|characters"),
            ("What?", replace(SHORT, max_tokens=100_000), "this server allows"),
            ("What?", replace(SHORT, temperature=float("nan")), "temperature"),
            ("a\ud800", SHORT, "surrogate"),
        ):
            with pytest.raises(ChatError, match=says):
                await ask(desk, session, question, options)
            assert not session.turns and len(session.attached) == 1 and not session.is_busy
        with pytest.raises(ChatError, match="Write a question"):
            await ask(desk, ChatSession(), " ")
        for _ in range(8):
            await desk.attach(session, "imu", session.attached[0].files)
        with pytest.raises(ChatError, match="has 9 media, and may have 9"):
            await desk.attach(session, "imu", session.attached[0].files)

    asyncio.run(check())


def test_every_modality_has_an_example_that_can_be_asked_about(
    desk: ChatDesk, tmp_path: Path
) -> None:
    assert list_examples([*desk.modalities, "smell"]) == desk.modalities

    async def check() -> None:
        session = ChatSession()
        for name in desk.modalities:
            example = make_example(name, tmp_path)
            assert example.question.endswith(("?", "."))
            await desk.attach(session, name, example.files)
        assert [medium.modality for medium in session.attached] == desk.modalities

    asyncio.run(check())


def test_conversations_are_kept_apart_and_bounded() -> None:
    sessions = ChatSessions(most=2)
    sessions.get("a").turns.append(ChatTurn("mine", ()))
    assert sessions.get("b").turns == [] and len(sessions.get("a").turns) == 1
    first = sessions.get("b")
    sessions.get("a")
    sessions.get("c")  # b was not used for longest
    assert first.was_stopped and len(sessions) == 2
    assert len(sessions.get("a").turns) == 1
    sessions.drop("a")
    assert sessions.get("a").turns == []


def test_messages_have_the_files_of_all_turns(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"x" * 600_000)
    turn = ChatTurn("What?", (ChatMedium("image", {"image": path}, path),), "Red.")
    system, user, assistant, last = make_messages("Hm", [turn, ChatTurn("And?", ())], 1)
    assert system == {"role": "system", "content": "Hm"}
    assert user["content"][0]["parts"] == {"image": path.read_bytes()}
    assert assistant == {"role": "assistant", "content": "Red."}
    assert last["content"] == [{"type": "text", "text": "And?"}]
    with pytest.raises(ChatError, match="larger than 1 MiB together"):
        make_messages("", [turn, turn], 1)
    path.unlink()
    with pytest.raises(ChatError, match=r"image: x\.png cannot be read any more"):
        make_messages("", [turn], 1)


def test_pictures_are_kept_for_a_while(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    old = save_picture(tmp_path, red)
    assert save_picture(tmp_path, red) == old
    past = time.time() - KEPT_SECONDS - 60
    os.utime(old, (past, past))
    new = save_picture(tmp_path, blue)
    assert not old.exists() and np.array_equal(np.asarray(Image.open(new)), np.asarray(blue))


@pytest.mark.seconds
def test_without_its_packages_the_command_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = sys.modules["onellm_dist.cli.chat"]  # the function has the module's name
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    options: dict[str, Any] = {"host": "127.0.0.1", "api_key": None}
    with pytest.raises(UsageError, match=r"pip install -e '\.\[ui\]'"):
        chat_command(tmp_path, **options)
