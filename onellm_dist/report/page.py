"""The page of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import yaml

from onellm_dist.common.html.charts import line_chart, stacked_bars
from onellm_dist.common.html.page import html_page, html_table
from onellm_dist.common.progress import seconds_text
from onellm_dist.report.account import DEFINITION, PARTS, WORDS, resume_seconds
from onellm_dist.report.attempts import PHASES, Attempt, median, number, stall
from onellm_dist.report.drawing import PART_COLOURS, PHASE_COLOURS, PHASE_WORDS, clock, timeline
from onellm_dist.report.findings import Facts, Finding, counted, span
from onellm_dist.report.read import Entry
from onellm_dist.report.summary import Summary
from onellm_dist.report.troubles import SLOW_FACTOR, words_of

SHOWN = 12
"""Lines of a table of troubles; the files have all of them."""
STYLE = """
.badge{color:#fff;border-radius:4px;padding:.1rem .5rem;font-size:.9rem;vertical-align:middle;font-weight:600}
.done{background:#228833}.running{background:#4477aa}.preempted{background:#b8860b}.failed,.lost,.usage{background:#d0455a}.none{background:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:.8rem;margin:1.2rem 0}
.tiles div{background:var(--soft);border-radius:6px;padding:.6rem .8rem}.tiles b{display:block;font-size:1.35rem;line-height:1.3}
.tiles span{color:var(--dim);font-size:12px}
ul.look{padding:0;list-style:none}ul.look li{padding:.5rem .8rem;margin:.4rem 0;background:var(--soft)}
ul.look li{border-left:4px solid var(--line);border-radius:3px}
ul.look .bad{border-color:#d0455a}ul.look .warn{border-color:#e0a52e}
.sub{color:var(--dim);margin:-.6rem 0 1rem}.small{font-size:13px;color:var(--dim)}
.two>div>h3{margin:.4rem 0 .2rem}details{margin-top:1rem}
pre{font-size:12px;overflow-x:auto;background:var(--soft);padding:.8rem;border-radius:6px}
td{overflow-wrap:anywhere}td.n,td .day{white-space:nowrap}td .badge{font-size:11px;padding:.05rem .4rem}
.narrow table{width:auto;min-width:50%}
@media print{body{max-width:none}h2{break-after:avoid}svg,table{break-inside:avoid}}
"""


def page_of(facts: Facts, summary: Summary, findings: Sequence[Finding]) -> str:
    """The whole page; it holds everything it shows."""
    name = str(facts.files.directory)
    body = [
        f'<h1>{escape(name)} <span class="badge {escape(summary.status)}">{escape(summary.status)}</span></h1>',
        f'<p class="sub">{escape(_subtitle(facts, summary))}</p>',
        _tiles(summary),
        "<h2>What to look at first</h2>",
        f'<ul class="look">{"".join(f"<li class={f.weight}>{escape(f.text)}</li>" for f in findings)}</ul>',
        *_sections(facts, summary),
    ]
    return html_page(f"run {name}", body, style=STYLE)


def _sections(facts: Facts, summary: Summary) -> Iterator[str]:
    if facts.attempts:
        yield "<h2>The run on a clock</h2>"
        yield timeline(facts.attempts)
        yield '<p class="small">A block is a start, as high as its ranks are many; between blocks the run waited for nodes.</p>'
    yield "<h2>Loss</h2>"
    yield from _loss(facts)
    yield "<h2>Optimizer and throughput</h2>"
    yield from _rates(facts)
    yield from _router(facts.files.steps)
    if facts.attempts:
        yield "<h2>Where the time went</h2>"
        yield from _time(facts, summary)
        yield "<h2>Starts</h2>"
        yield _starts(facts.attempts)
        yield "<h2>Resume time by phase</h2>"
        yield from _resume(facts.attempts)
    yield "<h2>Stalls and troubles</h2>"
    yield from _troubles(facts)
    if facts.files.config:
        text = yaml.safe_dump(facts.files.config, sort_keys=False)
        yield f"<details><summary>The resolved recipe (config.yaml)</summary><pre>{escape(text)}</pre></details>"
    yield f'<p class="small">Written {clock(facts.files.now)} from {escape(str(facts.files.directory))}; times are this machine\'s.</p>'


def _subtitle(facts: Facts, summary: Summary) -> str:
    setting, last = facts.files.setting, facts.attempts[-1] if facts.attempts else None
    words = [
        f"stage {setting('train', 'stage')}" if setting("train", "stage") else "",
        f"model {setting('model', 'path') or setting('model', 'preset')}"
        if facts.files.config.get("model")
        else "",
        f"global batch {setting('data', 'global_batch')}"
        if setting("data", "global_batch")
        else "",
        f"{counted(last.world, 'rank', 'ranks')} on {last.device or 'an unknown device'}"
        + (f", {counted(last.nodes, 'node', 'nodes')}" if last.nodes else "")
        if last
        else "",
        f"engine {setting('engine', 'name')}/{setting('engine', 'config') or 'zero3'}"
        if facts.files.config.get("engine")
        else "",
        str(setting("train", "precision") or ""),
        summary.reason,
    ]
    return " · ".join(word for word in words if word)


def _tiles(summary: Summary) -> str:
    tiles = [
        (
            "steps done",
            f"{summary.steps_done:,}"
            + (f" / {summary.steps_wanted:,}" if summary.steps_wanted else ""),
        ),
        ("loss, last steps", "–" if summary.loss is None else f"{summary.loss:.4f}"),
        ("goodput", "–" if summary.goodput is None else f"{summary.goodput:.1%}"),
        ("starts", f"{summary.starts}"),
        ("steps done in vain", f"{summary.lost_steps:,}"),
        (
            "tokens/s",
            "–" if summary.tokens_per_second is None else f"{summary.tokens_per_second:,.0f}",
        ),
        ("MFU", "–" if summary.mfu is None else f"{summary.mfu:.1%}"),
        ("waiting for data", "–" if summary.data_wait is None else f"{summary.data_wait:.1%}"),
    ]
    if summary.eta_seconds is not None:
        tiles.insert(1, ("time left at this rate", seconds_text(summary.eta_seconds)))
    return f'<div class="tiles">{"".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in tiles)}</div>'


def _points(steps: Sequence[Entry], key: str) -> list[tuple[float, float]]:
    """(steps done, value) where the value is a number."""
    return [
        (float(s["step"]) + 1, float(s[key]))
        for s in steps
        if isinstance(s.get(key), (int, float)) and not isinstance(s.get(key), bool)
    ]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred mean over a sixtieth of the run: no lag behind the steps."""
    half = len(points) // 120
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    ends = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, ends, strict=True)]


def _marks(attempts: Sequence[Attempt]) -> dict[float, str]:
    """Restarts on a step axis; a few get words too, very many are not drawn."""
    steps = [a.first_step for a in attempts[1:] if a.first_step is not None]
    if len(steps) > 12:
        return {}
    return {float(step): "restart" if len(steps) <= 3 else "" for step in steps}


def _loss(facts: Facts) -> Iterator[str]:
    raw = _points(facts.files.steps, "loss")
    series = {"each step": raw, "training": _smoothed(raw)}
    checked = _points(
        [{**v, "step": number(v.get("step")) - 1} for v in facts.files.validation], "loss"
    )
    if checked:
        series["validation"] = checked
    colours = {"each step": "#4477aa", "training": "#4477aa", "validation": "#ee6677"}
    total = line_chart(
        series,
        x_label="steps done",
        y_label="loss a token",
        colours=colours,
        marks=_marks(facts.attempts),
        pale=("each step",),
        dots=("validation",),
        from_zero=False,
    )
    names = sorted({name for s in facts.files.steps for name in s.get("loss_by_modality") or ()})
    if len(names) < 2:
        yield total
        return
    kinds = {
        name: _smoothed(
            _points(
                [
                    {"step": s["step"], name: (s.get("loss_by_modality") or {}).get(name)}
                    for s in facts.files.steps
                ],
                name,
            )
        )
        for name in names
    }
    parts = line_chart(
        {k: v for k, v in kinds.items() if v},
        x_label="steps done",
        y_label="loss a token",
        from_zero=False,
    )
    yield f'<div class="two"><div><h3>All samples</h3>{total}</div><div><h3>By modality</h3>{parts}</div></div>'


def _rates(facts: Facts) -> Iterator[str]:
    wanted: tuple[tuple[str, str, str], ...] = (
        ("lr", "Learning rate", "learning rate"),
        ("grad_norm", "Gradient norm, before clipping", "norm"),
        ("tokens_per_second", "Throughput, all ranks", "tokens/s"),
        ("data_wait_fraction", "Share of a step waiting for data", "share"),
        ("mfu", "Model FLOPs utilisation", "MFU"),
    )
    cells = []
    for key, title, unit in wanted:
        points = _points(facts.files.steps, key)
        if not points and key == "mfu":
            continue
        high = sorted(y for _, y in points)
        ceiling = 3 * high[int(0.98 * (len(high) - 1))] if key == "grad_norm" and high else None
        series = (
            {"each step": points}
            if key == "lr"
            else {"each step": points, "mean": _smoothed(points)}
        )
        chart = line_chart(
            series,
            x_label="steps done",
            y_label=unit,
            colours=dict.fromkeys(series, "#4477aa"),
            marks=_marks(facts.attempts),
            pale=() if key == "lr" else ("each step",),
            ceiling=ceiling,
            height=210,
        )
        cells.append(f"<div><h3>{title}</h3>{chart}</div>")
    yield f'<div class="two">{"".join(cells)}</div>'


def _router(steps: Sequence[Entry]) -> Iterator[str]:
    """Mean routing weight of each expert by modality, where the run recorded it (`router_load`: modality -> [E])."""
    lines = [s for s in steps if isinstance(s.get("router_load"), dict)]
    names = sorted(
        {name for s in lines for name, row in s["router_load"].items() if isinstance(row, list)}
    )
    if not names:
        return
    cells = []
    for name in names:
        experts = max(
            len(s["router_load"][name])
            for s in lines
            if isinstance(s["router_load"].get(name), list)
        )
        series = {
            f"expert {e + 1}": [
                (float(s["step"]) + 1, number(row[e]))
                for s in lines
                if isinstance(row := s["router_load"].get(name), list) and len(row) > e
            ]
            for e in range(experts)
        }
        cells.append(
            f"<div><h3>{escape(name)}</h3>{line_chart(series, x_label='steps done', y_label='routing weight', height=180)}</div>"
        )
    yield f'<h2>Router load</h2><div class="two">{"".join(cells)}</div>'


def _time(facts: Facts, summary: Summary) -> Iterator[str]:
    account = facts.account
    if account.allocated <= 0:
        yield '<p class="none">nothing was recorded</p>'
        return
    share = {name: 100 * seconds / account.allocated for name, seconds in account.parts.items()}
    yield stacked_bars([("allocated time", share)], PART_COLOURS, unit="%", keys=WORDS)
    rows = [
        (WORDS[n], f"{share[n]:.1f}%", _hours(account.parts[n]))
        for n in PARTS
        if account.parts[n] > 0
    ]
    unit = "GPU hours" if any(a.device.startswith("cuda") for a in facts.attempts) else "rank hours"
    yield html_table(
        ("", "share", unit),
        [*rows, ("allocated", "100.0%", _hours(account.allocated))],
        right=(1, 2),
    )
    goodput = "–" if summary.goodput is None else f"{summary.goodput:.1%}"
    yield f'<p><b>Goodput {goodput}.</b> <span class="small">{escape(DEFINITION)}</span></p>'
    words = f"Wall-clock time {seconds_text(account.wall)}, of it {seconds_text(account.queued)} between starts."
    if account.estimated:
        words += " Some begins and ends were not recorded by a job script (attempts.jsonl) and are reckoned from the run's own events."
    yield f'<p class="small">{escape(words)}</p>'


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _starts(attempts: Sequence[Attempt]) -> str:
    rows = []
    for a in attempts:
        job = f"{a.job}" + (f" / {a.restart}" if a.restart is not None else "") if a.job else "–"
        steps = (
            "–"
            if a.first_step is None
            else f"{a.first_step:,} → {a.last_step:,}"
            if a.last_step is not None
            else f"{a.first_step:,} →"
        )
        lost = (
            f"{'' if a.lost_known else '≈ '}{a.lost_steps} ({seconds_text(a.lost_seconds)})"
            if a.lost_steps
            else "0"
        )
        nodes = f"{a.nodes or '–'} / {a.world}"
        rows.append(
            (
                a.number,
                f'<span class="day">{clock(a.begin)}</span>',
                seconds_text(a.seconds),
                job,
                nodes,
                steps,
                lost,
                f'<span class="badge {escape(a.status)}">{escape(a.status)}</span> {escape(a.reason)}'
                + (f'<div class="small">{escape(a.node_list)}</div>' if a.node_list else ""),
            )
        )
    head = (
        "",
        "begin",
        "held",
        "job / requeue",
        "nodes / ranks",
        "steps",
        "in vain",
        "how it ended",
    )
    return html_table(head, rows, right=(0, 2, 5, 6), html=(1, 7))


def _resume(attempts: Sequence[Attempt]) -> Iterator[str]:
    rows = [
        (a, {name: a.phases.get(name, 0.0) for name in PHASES})
        for a in attempts
        if set(a.phases) - {"scheduler"}
    ]
    if not rows:
        yield '<p class="none">The starts recorded no phases (events `phase` in events.jsonl).</p>'
        return
    shown = rows[-40:]
    bars = [
        (
            f"start {a.number}",
            {name: seconds for name, seconds in parts.items() if name != "scheduler"},
        )
        for a, parts in shown
    ]
    yield stacked_bars(bars, PHASE_COLOURS, unit="s", keys=PHASE_WORDS)
    head = ["start", *(PHASE_WORDS[p].split(" (")[0].split(",")[0] for p in PHASES), "all, s"]
    table = [
        [
            a.number,
            *(f"{parts[p]:.1f}" if p in a.phases else "–" for p in PHASES),
            f"{resume_seconds(a):.1f}",
        ]
        for a, parts in shown
    ]
    if len(rows) > 2:
        known = {p: [parts[p] for a, parts in rows[1:] if p in a.phases] for p in PHASES}
        middle = [f"{median(known[p]):.1f}" if known[p] else "–" for p in PHASES]
        table.append(
            [
                "restarts' median",
                *middle,
                f"{median([resume_seconds(a) or 0.0 for a, _ in rows[1:]]):.1f}",
            ]
        )
    yield html_table(head, table, right=range(1, len(head)))
    yield (
        '<p class="small">To the first new step done: the bars from the moment that nodes were given, the table with the wait for them, '
        "which begins at the end of the start before.</p>"
    )


def _troubles(facts: Facts) -> Iterator[str]:
    t, nothing = facts.troubles, []
    if t.checkpoints:
        yield "<h3>Checkpoints</h3>"
        took = sum(number(c.get("seconds")) for c in t.checkpoints)
        words = (
            f"{len(t.checkpoints)} written in {span(took)}: median {t.checkpoint_median:.3g} s, "
        )
        words += f"longest {number(t.checkpoints[0].get('seconds')):.3g} s (step {t.checkpoints[0].get('step')})."
        if any("stall_seconds" in c for c in t.checkpoints):
            stalls = [stall(c) for c in t.checkpoints]
            words += (
                f" Training stood still for {span(sum(stalls))} of it, {max(stalls):.3g} s at most."
            )
        if t.grace_period is not None:
            words += f" The job's grace period is {span(t.grace_period)}: " + (
                f"{len(t.late)} took longer." if t.late else "every one of them fits."
            )
        yield f"<p>{escape(words)}</p>"
    else:
        nothing.append("checkpoints")
    tables: list[tuple[str, str, tuple[str, ...], list[tuple[Any, ...]], str]] = [
        (
            "slow steps",
            f"Steps slower than {SLOW_FACTOR:g} medians ({t.typical:.3g} s)",
            ("step", "start", "seconds", "medians", "waiting for data"),
            [
                (s.step, s.attempt, f"{s.seconds:.3g}", f"{s.times:.1f}", f"{s.waited:.0%}")
                for s in t.slow
            ],
            "by seconds",
        ),
        (
            "skipped steps",
            "Skipped steps",
            ("step", "time", "why"),
            [
                (
                    e.get("step", "?"),
                    e.get("time", ""),
                    words_of({k: v for k, v in e.items() if k != "step"}),
                )
                for e in reversed(t.skipped)
            ],
            "newest first",
        ),
        (
            "spikes of the gradient",
            "Spikes of the gradient norm",
            ("step", "norm", "median before"),
            [
                (step, f"{norm:.4g}", f"{before:.4g}")
                for step, norm, before in sorted(t.spikes, key=lambda s: -s[1])
            ],
            "by norm",
        ),
        (
            "unreadable samples",
            "Samples that could not be read (skipped_samples)",
            ("step", "sample", "why"),
            [
                (e.get("step", "?"), e.get("sample_id", "?"), e.get("reason", ""))
                for e in reversed(t.skipped_samples)
            ],
            "newest first",
        ),
        (
            "hangs, roll-backs or warnings",
            "Other events",
            ("time", "event", "what"),
            [(e.get("time", ""), e.get("event", "?"), words_of(e)) for e in reversed(t.others)],
            "newest first",
        ),
    ]
    for short, title, head, rows, order in tables:
        if not rows:
            nothing.append(short)
            continue
        more = f" ({SHOWN} of {len(rows):,}, {order})" if len(rows) > SHOWN else ""
        yield f'<h3>{escape(title)}{more}</h3><div class="narrow">{html_table(head, rows[:SHOWN])}</div>'
    if nothing:
        yield f'<p class="small">None recorded: {escape(", ".join(nothing))}.</p>'
    if facts.files.moved_aside:
        yield f'<p class="small">Earlier starts that this run did not go on from lie in {escape(", ".join(facts.files.moved_aside))}.</p>'
