"""The page of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import yaml

from onellm_dist.common.counts import format_count
from onellm_dist.common.html.page import build_html_page
from onellm_dist.common.progress import format_seconds
from onellm_dist.report.benchmark_scores import draw_benchmarks
from onellm_dist.report.curves import draw_loss, draw_rates, draw_router_load
from onellm_dist.report.facts import RunFacts
from onellm_dist.report.findings.finding import Finding
from onellm_dist.report.incident_tables import draw_incidents
from onellm_dist.report.prediction import Prediction, draw_prediction
from onellm_dist.report.start_tables import draw_starts, draw_startup, draw_time
from onellm_dist.report.summary import RunSummary
from onellm_dist.report.timeline import draw_timeline
from onellm_dist.report.wording import format_time

STYLE = """
.badge{color:#fff;border-radius:4px;padding:.1rem .5rem;font-size:.9rem;vertical-align:middle}
.badge{font-weight:600}
.done{background:#228833}.running{background:#4477aa}.preempted{background:#b8860b}
.failed,.lost,.usage{background:#d0455a}.none{background:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:.8rem}
.tiles{margin:1.2rem 0}
.tiles div{background:var(--soft);border-radius:6px;padding:.6rem .8rem}
.tiles b{display:block;font-size:1.35rem;line-height:1.3}
.tiles span{color:var(--dim);font-size:12px}
ul.look{padding:0;list-style:none}
ul.look li{padding:.5rem .8rem;margin:.4rem 0;background:var(--soft)}
ul.look li{border-left:4px solid var(--line);border-radius:3px}
ul.look .bad{border-color:#d0455a}ul.look .warn{border-color:#e0a52e}
.sub{color:var(--dim);margin:-.6rem 0 1rem}.small{font-size:13px;color:var(--dim)}
.two>div>h3{margin:.4rem 0 .2rem}details{margin-top:1rem}
pre{font-size:12px;overflow-x:auto;background:var(--soft);padding:.8rem;border-radius:6px}
td{overflow-wrap:anywhere}td.n,td .day{white-space:nowrap}
td .badge{font-size:11px;padding:.05rem .4rem}
.narrow table{width:auto;min-width:50%}
@media print{body{max-width:none}h2{break-after:avoid}svg,table{break-inside:avoid}}
"""


def build_page(
    facts: RunFacts,
    summary: RunSummary,
    findings: Sequence[Finding],
    prediction: Prediction | None = None,
) -> str:
    """The whole page as HTML; it contains everything it shows and needs no network."""
    name = str(facts.records.directory)
    status = escape(summary.status)
    items = "".join(f"<li class={f.weight}>{escape(f.text)}</li>" for f in findings)
    body = [
        f'<h1>{escape(name)} <span class="badge {status}">{status}</span></h1>',
        f'<p class="sub">{escape(_format_subtitle(facts, summary))}</p>',
        _draw_tiles(summary),
        "<h2>What to look at first</h2>",
        f'<ul class="look">{items}</ul>',
        *_draw_sections(facts, summary, prediction),
    ]
    return build_html_page(f"run {name}", body, style=STYLE)


def _draw_sections(
    facts: RunFacts, summary: RunSummary, prediction: Prediction | None
) -> Iterator[str]:
    if facts.starts:
        yield "<h2>Timeline</h2>"
        yield draw_timeline(facts.starts)
        yield (
            '<p class="small">Each block is one start; its height is the number of ranks. '
            "Between blocks the run waited for nodes.</p>"
        )
    yield "<h2>Loss</h2>"
    yield draw_loss(facts)
    yield from draw_benchmarks(facts.records.validation)
    yield "<h2>Optimizer and throughput</h2>"
    yield draw_rates(facts)
    yield from draw_router_load(facts.records.steps)
    if prediction is not None:
        yield from draw_prediction(prediction)
    if facts.starts:
        yield "<h2>Where the time went</h2>"
        yield from draw_time(facts, summary)
        yield "<h2>Starts</h2>"
        yield draw_starts(facts.starts)
        yield "<h2>Start-up timing</h2>"
        yield from draw_startup(facts.starts)
    yield "<h2>Stalls and incidents</h2>"
    yield from draw_incidents(facts)
    if facts.records.config:
        text = escape(yaml.safe_dump(facts.records.config, sort_keys=False))
        yield (
            "<details><summary>The resolved recipe (config.yaml)</summary>"
            f"<pre>{text}</pre></details>"
        )
    yield (
        f'<p class="small">Written {format_time(facts.records.now)} from '
        f"{escape(str(facts.records.directory))}; times are in this machine's time zone.</p>"
    )


def _format_subtitle(facts: RunFacts, summary: RunSummary) -> str:
    get = facts.records.get_setting
    config = facts.records.config
    parts = list[str]()
    if get("train", "stage"):
        parts.append(f"stage {get('train', 'stage')}")
    if config.get("model"):
        parts.append(f"model {get('model', 'path') or get('model', 'preset')}")
    if get("data", "global_batch"):
        parts.append(f"global batch {get('data', 'global_batch')}")
    if facts.starts:
        last = facts.starts[-1]
        ranks = format_count(last.world_size, "rank")
        nodes = f", {format_count(last.nodes, 'node')}" if last.nodes else ""
        parts.append(f"{ranks} on {last.device or 'an unknown device'}{nodes}")
    if config.get("engine"):
        own = get("engine", "config")
        parts.append(f"engine {get('engine', 'name')}" + (f"/{own}" if own else ""))
    parts += [str(get("train", "precision") or ""), summary.reason]
    return " · ".join(part for part in parts if part)


def _draw_tiles(summary: RunSummary) -> str:
    wanted = f" / {summary.steps_wanted:,}" if summary.steps_wanted else ""
    tiles = {"steps done": f"{summary.steps_done:,}{wanted}"}
    if summary.eta_seconds is not None:
        tiles["time left at this rate"] = format_seconds(summary.eta_seconds)
    tiles |= {
        "loss, last steps": _format_or_dash(summary.loss, ".4f"),
        "goodput": _format_or_dash(summary.goodput, ".1%"),
        "starts": f"{summary.start_count}",
        "lost steps": f"{summary.lost_steps:,}",
        "tokens/s": _format_or_dash(summary.tokens_per_second, ",.0f"),
        "MFU": _format_or_dash(summary.mfu, ".1%"),
        "waiting for data": _format_or_dash(summary.data_wait, ".1%"),
    }
    cells = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>"
        for label, value in tiles.items()
    )
    return f'<div class="tiles">{cells}</div>'


def _format_or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
