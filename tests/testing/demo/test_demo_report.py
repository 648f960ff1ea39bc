"""The report is one well-formed page with its pictures inside, and the table is right."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from onellm_dist.common.html.charts import draw_line_chart, draw_router_chart, smooth, thin
from onellm_dist.evaluation.report import Caption, format_table, summarise_captions, to_json_rows
from onellm_dist.testing.demo.report import Curve, DemoReport, ShownSample, write_report

VOID = {"meta", "img", "br", "link", "input"}


class Checker(HTMLParser):
    """Fails on a tag that closes another one; collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def make_captions() -> list[Caption]:
    colours, shapes = ["red", "green", "blue"], ["circle", "square", "star"]
    made = []
    for split, right in (("test_seen", 1.0), ("test_held_out", 0.0)):
        for i in range(45):
            reference = f"a {colours[i % 3]} {shapes[i // 3 % 3]}"
            made.append(
                Caption(
                    f"{i:03d}",
                    "image",
                    split,
                    reference,
                    reference if right else "a <b>red</b> star",
                )
            )
    return made


CANDIDATES = {
    "image": [f"a {c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square", "star")]
}


def test_table_distinguishes_a_reader_from_a_parrot() -> None:
    (image,) = summarise_captions(make_captions(), CANDIDATES)
    seen, held_out = image.splits["test_seen"], image.splits["test_held_out"]
    assert (seen.own.exact_match.mean, seen.beats_control) == (1.0, True)
    assert (held_out.own.exact_match.mean, held_out.beats_control) == (0.0, False)
    assert seen.chance[0] == pytest.approx(1 / 9)
    assert seen.example.prediction == seen.example.reference
    text = format_table([image])
    assert "1.00 [0.92, 1.00]" in text and re.search(r"held_out .* NO ", text)
    assert [row["beats_control"] for row in to_json_rows([image])] == [True, False]


def test_report_is_one_complete_page(tmp_path: Path) -> None:
    results = summarise_captions(make_captions(), CANDIDATES)
    picture = Image.new("RGB", (960, 300), (200, 30, 40))
    router = {"image": [[0.2, 0.3, 0.5]] * 30, "audio": [[0.4, 0.4, 0.2]] * 30}
    falling = [(float(i), 3 - i / 100) for i in range(200)]
    report = DemoReport(
        title="toy <world>",
        facts={"samples": "12 & more"},
        results=results,
        curves=[Curve("align image", falling, {"image": falling}, {50: "killed"})],
        routers={"after align": router},
        samples=[ShownSample("image", picture, "a red star", "a red star", "test_held_out")],
        timetable=[("shards", 60, 58.2)],
    )
    path = tmp_path / "report.html"
    write_report(path, report)
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert (
        checker.seen.count("svg") == 3
        and checker.seen.count("img") == 1
        and checker.seen.count("rect") == 2 * 3 * 30
    )
    assert checker.loads and all(
        load.startswith("data:image/png;base64,") for load in checker.loads
    )
    assert not re.search(r"<script|@import|url\(", page)
    shown = Image.open(io.BytesIO(base64.b64decode(checker.loads[0].split(",", 1)[1])))
    assert shown.size == (480, 150) and shown.getpixel((5, 5)) == (200, 30, 40)
    assert (
        "toy &lt;world&gt;" in page
        and "<b>red</b>" not in page
        and "killed" in page
        and "58 s" in page
    )
    assert list(tmp_path.iterdir()) == [path]


def test_line_chart_scales_to_its_points() -> None:
    chart = draw_line_chart({"a": [(0, 0.0), (10, 2.0)]}, x_label="step", y_label="loss")
    (points,) = re.findall(r'points="([^"]+)"', chart)
    (x0, y0), (x1, y1) = (tuple(map(float, p.split(","))) for p in points.split())
    width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)[0])
    assert (
        0 < x0 < 0.15 * width and 0.95 * width < x1 < width
    )  # the first point at the axis, the last one at the right edge
    assert (
        0.8 * height < y0 < height and 0 < y1 < 0.2 * height
    )  # zero at the bottom, the largest value near the top
    assert "nothing was recorded" in draw_line_chart({}, x_label="step", y_label="loss")


def test_smooth_and_thin() -> None:
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    points = [(float(i), float(i)) for i in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100 and thinned[0] == points[0] and thinned[-1] == points[-1]


def test_router_chart_shows_every_weight() -> None:
    chart = draw_router_chart({"imu": [[0.25, 0.75], [0.5, 0.5]]})
    assert "expert 2, query 1: 0.750" in chart and ">0.375<" in chart and ">0.625<" in chart
