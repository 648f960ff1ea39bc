"""Progress displays with and without a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from onellm_dist.common.progress import format_seconds, progress


def test_plain_lines_show_share_rate_and_eta(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4, "Building", unit="samples", every=0.0) as bar:
        bar.advance()
        bar.note("1 bad")
        bar.advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"Building: 1/4 \(25%\) samples, \S+/s, ETA \d+ s", lines[0])
    assert re.fullmatch(r"Building: 4/4 \(100%\) samples, \S+/s, ETA 0 s, 1 bad", lines[1])
    assert re.fullmatch(r"Building: 4/4 \(100%\) samples, \S+/s, done after 0 s, 1 bad", lines[2])


def test_iterating_gives_the_items_and_one_line_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(progress(iter("abc"), "Reading")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert re.fullmatch(r"Reading: 3, \S+/s, done after 0 s\n", captured.err)
    assert captured.out == ""


def test_an_error_is_not_reported_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    def fail_after_one() -> None:
        with progress(2, "Work") as bar:
            bar.advance()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_one()
    assert "Work: 1/2 (50%)" in (text := capsys.readouterr().err)
    assert "stopped after" in text


def test_silent_when_not_enabled(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2], "x", enabled=False, every=0.0)) == [1, 2]
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_nest_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich allows one live display; a second one inside it must not fail."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    for _ in range(2):
        for _ in progress(["a"], "Outer bar"):
            with progress(3, "Inner bar", unit="things") as bar:
                bar.advance(3)
                bar.note("all well")
    text = terminal.getvalue()
    assert "Outer bar" in text
    assert re.search(r"Inner bar.*3/3.*things.*all well", text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_seconds_as_people_write_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
