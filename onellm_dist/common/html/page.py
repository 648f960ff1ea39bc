"""A static HTML page that contains all it shows, without scripts, for light and dark screens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path

from onellm_dist.common.files import write_atomic

STYLE = """
:root{--fg:#1b1f24;--bg:#fff;--dim:#667;--line:#d8dce2;--soft:#f5f6f8}
@media(prefers-color-scheme:dark){:root{--fg:#e8eaed;--bg:#15181c;--dim:#9aa4b2;--line:#343a42;
--soft:#1e2328}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1080px;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}
h2{font-size:1.2rem;margin-top:2.4rem;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .5rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right}
svg{width:100%;height:auto;font:11px system-ui,sans-serif}svg text{fill:var(--dim)}
svg .grid{stroke:var(--line)}svg .mark{stroke:var(--dim);stroke-dasharray:4 3}
.legend span{margin-right:1rem;font-size:13px;white-space:nowrap;display:inline-block}
.legend i{display:inline-block;width:12px;height:3px;margin-right:5px;vertical-align:middle}
.right{color:#228833}.wrong{color:#d0455a}.dim,.none{color:var(--dim);font-size:13px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1rem}
""".strip()


def build_html_page(title: str, body: Iterable[str], *, style: str = "") -> str:
    """Build a complete page.

    Args:
        title: the title, as text.
        body: pieces of HTML.
        style: CSS in addition to the common style sheet.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style>"
    )
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'
    )


def build_html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Collection[int] = (),
    html: Collection[int] = (),
) -> str:
    """Build a table.

    Args:
        head: one heading per column; no heading line if all are empty.
        rows: the cells of each row; integers get thousands separators.
        right: columns that are aligned to the right (numbers).
        html: columns whose cells are HTML already; all others are escaped.
    """

    def cell(tag: str, column: int, value: object) -> str:
        text = (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )
        number = ' class="n"' if column in right else ""
        return f"<{tag}{number}>{text if column in html and tag == 'td' else escape(text)}</{tag}>"

    heading = (
        f"<thead><tr>{''.join(cell('th', i, h) for i, h in enumerate(head))}</tr></thead>"
        if any(head)
        else ""
    )
    body = "".join(
        f"<tr>{''.join(cell('td', i, v) for i, v in enumerate(row))}</tr>" for row in rows
    )
    return f"<table>{heading}<tbody>{body}</tbody></table>"


def write_page(path: Path, page: str) -> None:
    """Write a page atomically, creating its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Captions may contain half a surrogate pair.
    write_atomic(path, page.encode("utf-8", errors="replace"))
