"""The examples are shown in the documentation, as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import ROOT, pages

SNIPPET = re.compile(r'^--8<-- "(?P<path>[^"]+)"$')
LOOKS_LIKE_ONE = re.compile(r"-\s*8\s*<\s*-")
"""Also what a formatter of Python makes of it: `--8 < --"..."`."""
EXAMPLES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "examples").rglob("*.py")
    if "__pycache__" not in path.parts
)


def included(page: str) -> list[str]:
    """The files that a page includes; a line that only looks like an inclusion fails."""
    found = []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if LOOKS_LIKE_ONE.search(line):
            match = SNIPPET.match(line)
            assert match, f"{page}:{number}: a broken snippet: {line}"
            assert (ROOT / match["path"]).is_file(), f"{page}:{number}: no file {match['path']}"
            found.append(match["path"])
    return found


INCLUDING = [page for page in pages() if page.startswith("docs/")]


@pytest.mark.parametrize("page", INCLUDING)
def test_no_page_has_a_broken_snippet(page: str) -> None:
    included(page)


def test_every_example_is_on_a_page() -> None:
    shown = {path for page in INCLUDING for path in included(page)}
    assert len(EXAMPLES) >= 5
    assert set(EXAMPLES) <= shown


def test_the_site_shows_the_code_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendered with the extensions of mkdocs.yml, as the site is."""
    mkdocs = pytest.importorskip("mkdocs.config")
    markdown = pytest.importorskip("markdown")
    monkeypatch.chdir(ROOT)  # snippets are looked for from the checkout
    config = mkdocs.load_config(str(ROOT / "mkdocs.yml"), plugins=[])
    for page in INCLUDING:
        for path in included(page):
            renderer = markdown.Markdown(
                extensions=config.markdown_extensions, extension_configs=config.mdx_configs
            )
            html = renderer.convert((ROOT / page).read_text(encoding="utf-8"))
            shown = "".join(re.sub(r"<[^>]+>", "", html).split())
            line = first_import(ROOT / path)
            assert "".join(line.split()) in shown, f"{page} does not show {path}"


def first_import(path: Path) -> str:
    """A line of an example that says what it is about."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("from onellm_dist"))
