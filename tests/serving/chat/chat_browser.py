"""Drives the page of the chat in a real browser: run by an environment that has playwright.

Usage: python chat_browser.py URL FOLDER CHROMIUM. FOLDER has a folder of files for each modality,
called as its parts are, and gets the screenshots. Prints a line for each check, and ends with
status 1 if one failed.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

SECONDS = 60_000
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 390, "height": 844}


class ChatDriver:
    """A user in front of a page of the chat."""

    def __init__(self, page: Page, folder: Path) -> None:
        self.page = page
        self.folder = folder

    @property
    def question(self) -> Locator:
        return self.page.locator("#question textarea")

    @property
    def status(self) -> Locator:
        return self.page.locator("#status")

    def answers(self) -> list[str]:
        found: list[str] = self.page.locator("#conversation [data-testid=bot]").all_inner_texts()
        return found

    def choose(self, modality: str) -> None:
        self.page.locator("#modality").get_by_text(modality, exact=True).click()
        expect(self.page.locator("#file-0")).to_contain_text(f"{modality} (.", timeout=SECONDS)

    def put_files(self, files: list[Path]) -> None:
        for number, path in enumerate(files):
            field = self.page.locator(f"#file-{number}")
            field.locator("input[type=file]").set_input_files(path)
            expect(field).to_contain_text("B ⇣", timeout=SECONDS)  # its size

    def attach(self, modality: str) -> None:
        self.choose(modality)
        files = sorted((self.folder / modality).iterdir())
        # The map comes first, then its picture.
        files.sort(key=lambda path: path.stem != modality)
        self.put_files(files)
        self.page.locator("#attach").click()
        name = f"{modality}: {files[0].name}"
        expect(self.status).to_contain_text(re.compile(f"Attached: .*{name}"), timeout=SECONDS)
        expect(self.page.locator("#seen img").first).to_be_visible(timeout=SECONDS)

    def ask(self, question: str) -> str:
        self.question.fill(question)
        self.question.press("Enter")
        return self.read_answer()

    def read_answer(self) -> str:
        expect(self.status).to_contain_text("tokens in", timeout=SECONDS)
        return self.answers()[-1].strip()

    def start_answer(self, question: str) -> None:
        self.question.fill(question)
        self.question.press("Enter")
        bots = self.page.locator("#conversation [data-testid=bot]")
        expect(bots).to_have_count(1, timeout=SECONDS)

    def clear(self) -> None:
        self.page.locator("#clear").click()
        expect(self.page.locator("#conversation [data-testid=bot]")).to_have_count(0)
        expect(self.status).to_have_text("")

    def find_long_answer(self) -> tuple[str, float]:
        """A question whose answer is as long as it may be, and its seconds."""
        for question in ("Tell me a long story.", "What?", "What is it?", "Say more.", "And then?"):
            began = time.monotonic()
            self.ask(question)
            seconds = time.monotonic() - began
            cut = self.status.inner_text().startswith("cut")
            self.clear()
            if cut:
                return question, seconds
        raise AssertionError("no answer is long")

    def show(self, name: str) -> None:
        self.page.screenshot(path=str(self.folder / f"{name}.png"), full_page=True)

    def set_length(self, tokens: int) -> None:
        self.page.get_by_text("Decoding", exact=True).click()
        field = self.page.get_by_label("number input for Longest answer, in tokens")
        field.fill(str(tokens))
        field.press("Tab")


class BrowserChecks:
    """What is checked, each in pages of its own."""

    def __init__(self, browser: Browser, url: str, folder: Path) -> None:
        self._browser = browser
        self._url = url
        self._folder = folder
        self.elsewhere: set[str] = set()
        """Other hosts that the page asked."""

    @contextmanager
    def open(self, **options: Any) -> Iterator[ChatDriver]:
        """A page of a user of its own."""
        context = self._browser.new_context(**{"viewport": WIDE, **options})
        page = context.new_page()
        own = urlsplit(self._url).netloc

        def note(request: Any) -> None:
            host = urlsplit(request.url).netloc
            if host not in (own, ""):
                self.elsewhere.add(host)

        page.on("request", note)
        page.goto(self._url)
        driver = ChatDriver(page, self._folder)
        expect(driver.question).to_be_visible(timeout=SECONDS)
        yield driver
        context.close()

    def check_modalities(self) -> None:
        answers = {}
        names = sorted(path.name for path in self._folder.iterdir() if path.is_dir())
        for name in names:
            with self.open() as user:
                user.attach(name)
                answers[name] = user.ask("What is it?")
                assert answers[name], name
                expect(user.page.locator("#conversation img").first).to_be_visible()
                for button in user.page.get_by_label("Share", exact=True).all():
                    expect(button).to_be_hidden()
                user.page.get_by_text("Prompt as sent", exact=True).click()
                prompt = user.page.get_by_label("What the model continued")
                assert f"⟨{name}: 32 positions⟩" in prompt.input_value()
                user.show(f"modality-{name}")
        assert len(names) == 8 and len(set(answers.values())) > 3, answers

    def check_several_turns_and_media(self) -> None:
        with self.open() as user:
            user.attach("image")
            user.attach("audio")
            user.ask("What do you see and hear?")
            user.attach("image")
            user.ask("And this <b>one</b>?")
            assert len(user.answers()) == 2
            said = user.page.locator("#conversation [data-testid=user]").all_inner_texts()
            assert any("<b>one</b>" in text for text in said), said  # as it was written
            old = user.status.inner_text()  # it names a seed
            user.page.locator("#again").click()
            expect(user.status).not_to_contain_text(old, timeout=SECONDS)
            user.read_answer()
            assert len(user.answers()) == 2
            user.show("turns")
            user.clear()

    def check_bad_files(self) -> None:
        bad = self._folder / "broken.png"
        with self.open() as user:
            user.question.fill("What is it?")
            user.put_files([bad])
            user.page.locator("#attach").click()
            expect(user.page.get_by_role("alert")).to_contain_text("broken.png", timeout=SECONDS)
            user.show("bad-file")
            user.page.locator("#detach").click()
            expect(user.status).to_contain_text("Nothing is attached", timeout=SECONDS)
            user.put_files([bad])
            user.question.press("Enter")  # it is refused again, and nothing is lost
            expect(user.page.get_by_role("alert")).to_contain_text("broken.png", timeout=SECONDS)
            assert user.question.input_value() == "What is it?"
            assert user.answers() == []

    def check_two_users(self) -> None:
        with self.open() as first, self.open() as second:
            first.attach("image")
            second.attach("audio")
            for user, question in ((first, "What is this?"), (second, "What was that?")):
                user.question.fill(question)
            for user in (first, second):
                user.question.press("Enter")
            found = [user.read_answer() for user in (first, second)]
            assert found[0] != found[1]
            texts = [user.page.locator("#conversation").inner_text() for user in (first, second)]
            assert "What was that?" not in texts[0] and "What is this?" not in texts[1]

    def check_stop_and_leaving(self) -> None:
        with self.open() as user:
            user.set_length(1000)
            question, whole = user.find_long_answer()
            user.start_answer(question)
            user.page.locator("#stop").click()
            expect(user.status).to_contain_text("stopped", timeout=SECONDS)
            assert user.answers()[-1].strip()
            user.clear()
            user.start_answer(question)
        with self.open() as other:  # one is answered at a time: the place must be free
            other.set_length(2)
            began = time.monotonic()
            other.ask("What?")
            assert time.monotonic() - began < max(whole / 2, 3), whole

    def check_keyboard(self) -> None:
        with self.open() as user:
            reach(user.page, "example-image")
            user.page.keyboard.press("Enter")
            expect(user.status).to_contain_text("Attached: image", timeout=SECONDS)
            assert user.question.input_value()
            reach(user.page, "send")
            user.page.keyboard.press("Enter")
            assert user.read_answer()
            reach(user.page, "clear")
            user.page.keyboard.press("Space")
            expect(user.page.locator("#conversation [data-testid=bot]")).to_have_count(0)
            reach(user.page, "modality")
            for key, label in (("Right", "video"), ("Right", "audio"), ("Left", "video")):
                user.page.keyboard.press(f"Arrow{key}")
                expect(user.page.locator("#file-0")).to_contain_text(f"{label} (.")
            reach(user.page, "file-0")

    def check_schemes_and_widths(self) -> None:
        for scheme in ("light", "dark"):
            for width, viewport in (("wide", WIDE), ("narrow", NARROW)):
                with self.open(color_scheme=scheme, viewport=viewport) as user:
                    user.page.locator("#example-depth").click()
                    expect(user.status).to_contain_text("Attached", timeout=SECONDS)
                    user.page.locator("#send").click()
                    user.read_answer()
                    wide = user.page.evaluate("document.documentElement.scrollWidth")
                    assert wide <= viewport["width"], wide
                    light = user.page.evaluate(
                        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g)"
                        ".map(Number).reduce((a, b) => a + b)"
                    )
                    assert (light > 380) == (scheme == "light"), (scheme, light)
                    user.show(f"{scheme}-{width}")

    def check_files_of_the_machine_and_addresses(self) -> None:
        with self.open() as user:
            for name in (
                "file=/etc/passwd",
                "file=http://example.org/",
                "proxy=http://example.org/",
            ):
                status = user.page.evaluate(
                    "name => fetch(`/gradio_api/${name}`).then(answer => answer.status)", name
                )
                assert status in (403, 404), (name, status)
            for path in ("/etc/passwd", "http://example.org/cat.png"):
                stolen = {"path": path, "meta": {"_type": "gradio.FileData"}}
                body = {
                    "data": ["image", stolen, None, None],
                    "fn_index": 0,
                    "session_hash": "thief",
                }
                status, text = user.page.evaluate(
                    """async body => {
                        const headers = {'Content-Type': 'application/json'};
                        const answer = await fetch('/gradio_api/queue/join', {
                            method: 'POST', headers, body: JSON.stringify(body)});
                        return [answer.status, await answer.text()];
                    }""",
                    body,
                )
                assert status == 403 and "not uploaded" in text, (status, text)
            policy = user.page.evaluate(
                "fetch('/').then(answer => answer.headers.get('content-security-policy'))"
            )
            assert "connect-src 'self'" in policy, policy

    def check_nothing_is_asked_elsewhere(self) -> None:
        assert not self.elsewhere, self.elsewhere


def reach(page: Page, name: str) -> None:
    """Press Tab until the focus is inside an element, as people without a mouse do."""
    inside = f"!!document.activeElement.closest('#{name}')"
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate(inside):
            return
    raise AssertionError(f"{name} cannot be reached by Tab")


def run_checks(url: str, folder: Path, chromium: str) -> list[str]:
    """Run all checks; returns those that failed."""
    failed = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        checks = BrowserChecks(browser, url, folder)
        found: list[tuple[str, Callable[[], None]]] = [
            (name, getattr(checks, name))
            for name in vars(BrowserChecks)
            if name.startswith("check_")
        ]
        for name, check in found:
            began = time.monotonic()
            try:
                check()
                print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
            except Exception:
                failed.append(name)
                print(f"{name} failed\n{traceback.format_exc()}", flush=True)
        browser.close()
    return failed


if __name__ == "__main__":
    sys.exit(1 if run_checks(sys.argv[1], Path(sys.argv[2]), sys.argv[3]) else 0)
