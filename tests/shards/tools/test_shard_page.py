"""The static pages show what is in a dataset, fetch nothing, and escape what users wrote."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from shard_worlds import picture, sound, write_tree

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.tools.preview import build_page, draw_histogram, preview_command


class _Balanced(HTMLParser):
    """Checks that every tag is closed in order, and collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")
        ]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_html(html: str) -> str:
    reader = _Balanced()
    reader.feed(html)
    assert (reader.open, reader.fetched) == ([], [])
    return html


def test_the_page_of_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, bytes | str] = {
        f"{i:02d}{e}": d
        for i in range(12)
        for e, d in ((".jpg", picture(i)), (".txt", f"<b>caption</b> {i}"))
    }
    build_dataset(
        "folder",
        write_tree(tmp_path / "in", {**files, "05.jpg": b"broken"}),
        tmp_path / "set",
        options={"max_samples": 5, "licence": "CC0-1.0"},
    )
    assert preview_command(tmp_path / "set", tmp_path / "stats.html", previews=0, seed=0) == 0
    stats = check_html((tmp_path / "stats.html").read_text())
    for words in (
        "CC0-1.0",
        "unreadable image",
        "&lt;b&gt;caption&lt;/b&gt;",
        "11 values, least 16, median 16, mean 16.18, greatest 17 bytes",
    ):
        assert words in stats
    assert "<b>caption" not in stats
    assert "<img" not in stats
    drawn = check_html(build_page(tmp_path / "set", previews=6))
    assert 1 <= drawn.count('<img alt="image" src="data:image/jpeg;base64,') <= 6
    assert drawn == build_page(tmp_path / "set", previews=6)
    assert "bytes; open it" in capsys.readouterr().out
    with pytest.raises(UsageError, match="cannot be written"):
        preview_command(tmp_path / "set", tmp_path / "stats.html/x.html", previews=0, seed=0)


def test_durations_are_measured(tmp_path: Path) -> None:
    files = {f"{i}{e}": d for i in range(3) for e, d in ((".wav", sound(i)), (".txt", "x"))}
    build_dataset("folder", write_tree(tmp_path / "in", files), tmp_path / "set")
    html = check_html(build_page(tmp_path / "set", previews=0))
    assert re.search(r"3 values, least 0\.2, median 0\.2, mean 0\.2, greatest 0\.2 s", html)


def test_a_histogram_counts_every_value() -> None:
    html = draw_histogram([1.0] * 5 + [3.0], "s")
    assert sum(int(n) for n in re.findall(r" s: (\d+)</title>", html)) == 6
    assert draw_histogram([], "s") == "<p>no values</p>"


def test_texts_of_every_kind_and_what_was_left_out(tmp_path: Path) -> None:
    """Conversations have a line a turn, lists all captions; bad samples come with an example."""
    rows = [
        {
            "id": "talk",
            "conversations": [
                {"from": "human", "value": "<what>?"},
                {"from": "gpt", "value": "this"},
            ],
        },
        {"id": "bad", "caption": " "},
        {
            "id": "again",
            "conversations": [
                {"from": "human", "value": "<what>?"},
                {"from": "gpt", "value": "this"},
            ],
        },
    ]
    inputs = write_tree(
        tmp_path / "in",
        {
            "t.jsonl": "\n".join(json.dumps(r) for r in rows),
            "list.json": '{"caption": ["one", "a & b"]}',
        },
    )
    build_dataset(
        "folder",
        inputs / "t.jsonl",
        tmp_path / "set",
        options={"modality": "text", "max_failures": 0.5, "dedup": "exact"},
    )
    html = check_html(build_page(tmp_path / "set", previews=3))
    assert "<b>Q:</b> &lt;what&gt;?<br><b>A:</b> this" in html
    assert "1 sample of text alone" in html
    assert "1 bad of 3 that the source listed" in html
    assert re.search(
        r"<td>empty caption</td><td class=\"n\">1</td><td>[^<]*t\.jsonl:2: empty caption</td>", html
    )
    assert '<td>duplicate: exact</td><td class="n">1</td>' in html
    (inputs / "t.jsonl").unlink()
    build_dataset("folder", inputs, tmp_path / "list", options={"modality": "text"})
    assert (
        "2 captions, of which an epoch reads one:</span><ul><li>one</li><li>a &amp; b</li></ul>"
        in build_page(tmp_path / "list", previews=0)
    )


def test_every_sample_of_a_small_dataset_is_shown_once(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        f"{i:02d}{e}": d
        for i in range(9)
        for e, d in ((".jpg", picture(i)), (".txt", f"number {i}"))
    }
    build_dataset(
        "folder", write_tree(tmp_path / "in", files), tmp_path / "set", options={"max_samples": 4}
    )
    html = build_page(tmp_path / "set", previews=20)
    assert [html.count(f"<figcaption>number {i}<") for i in range(9)] == [1] * 9
    assert "image: The picture, at most 448 pixels a side." in html
