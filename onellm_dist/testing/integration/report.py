"""What an integration run must have shown, and the table of its results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onellm_dist.common.progress import format_seconds
from onellm_dist.modalities import all_modalities
from onellm_dist.testing.integration.media import FEWEST

TRAINED = {"align": ("projectors", "tokenizers", "upm"), "tune": ("llm",)}
"""Parts of the model that each stage trains; the others must not change by a bit."""
LONGEST_ANSWER = 90


def check_facts(facts: Mapping[str, Any], *, steps: int) -> dict[str, bool]:
    """Check what a run found.

    Args:
        facts: what the run found so far; a phase that was not reached is missing.
        steps: optimizer steps of each stage.

    Returns:
        The name of each check, and whether it passed.
    """
    media = facts.get("media", {})
    found = {
        "no phase failed": "error" not in facts,
        f"at least {FEWEST} real samples of every modality": bool(media)
        and all(len(media.get(m, ())) >= FEWEST for m in all_modalities()),
    }
    for stage in TRAINED:
        found |= _check_stage(facts, stage, steps)
    inputs = [tuple(name.split()[0] for name in row["inputs"]) for row in facts.get("generate", [])]
    found["generate answered for every modality and for a joint input"] = all(
        (m,) in inputs for m in all_modalities()
    ) and any(len(names) > 1 for names in inputs)
    evaluation = facts.get("evaluation", {})
    rows, overlap = evaluation.get("tasks", {}), evaluation.get("overlap", {})
    found["onellm evaluate answered every question of the benchmarks"] = bool(rows) and all(
        row["questions"] == row["answered"] > 0 for row in rows.values()
    )
    found["onellm shards overlap found the copied pictures and nothing else"] = (
        sum(overlap.get("expected", {}).values()) > 0 and overlap["found"] == overlap["expected"]
    )
    found[f"at most {facts['limit_gib']:g} GiB of memory"] = (
        0 < facts["peak_gib"] <= facts["limit_gib"]
    )
    return found


def _check_stage(facts: Mapping[str, Any], stage: str, steps: int) -> dict[str, bool]:
    trained = TRAINED[stage]
    rows = facts.get(stage, [])
    shares = facts.get("weights_changed", {}).get(stage, {})
    finite = all(
        math.isfinite(row.get(key) or math.nan) for row in rows for key in ("loss", "grad_norm")
    )
    return {
        f"{stage}: {steps} optimizer steps, every loss and gradient norm finite": finite
        and len(rows) == steps,
        f"{stage}: trained on every modality": bool(rows)
        and all(
            any((row.get("loss_by_modality") or {}).get(m) is not None for row in rows)
            for m in all_modalities()
        ),
        f"{stage}: {', '.join(trained)} changed": bool(shares)
        and all(shares.get(part, 0) > 0.5 for part in trained),
        f"{stage}: everything else is bit for bit as before": bool(shares)
        and all(share == 0 for part, share in shares.items() if part not in trained),
    }


def format_report(facts: Mapping[str, Any]) -> str:
    """Format the results of a run as plain text."""
    phases = [
        (p["phase"], format_seconds(p["seconds"]), f"{p['peak_gib']:.1f} GiB")
        for p in facts["phases"]
    ]
    whole = ("all", format_seconds(facts["seconds"]), f"{facts['peak_gib']:.1f} GiB")
    blocks = [_format_table(("phase", "time", "peak memory"), [*phases, whole])]
    blocks += [_format_losses(stage, facts[stage]) for stage in TRAINED if facts.get(stage)]
    if facts.get("generate"):
        blocks.append(_format_answers(facts["generate"]))
    if facts.get("evaluation"):
        blocks.append(_format_scores(facts["evaluation"]))
    checks = [f"{'yes' if held else 'NO ':4}{name}" for name, held in facts["checks"].items()]
    ending = "The integration run passed" if facts["ok"] else "The integration run FAILED"
    seconds, peak = format_seconds(facts["seconds"]), facts["peak_gib"]
    blocks.append("\n".join(checks))
    blocks.append(f"{ending}: {seconds}, {peak:.1f} GiB at most.")
    return "\n" + "\n\n".join(blocks)


def _format_losses(stage: str, steps: Sequence[Mapping[str, Any]]) -> str:
    names = [
        m for m in all_modalities() if any(m in (s.get("loss_by_modality") or {}) for s in steps)
    ]
    rows = [
        (
            s["step"],
            _format_number(s.get("loss")),
            _format_number(s.get("grad_norm")),
            *(_format_number((s.get("loss_by_modality") or {}).get(m)) for m in names),
        )
        for s in steps
    ]
    title = f"{stage}: loss by step and modality (so few steps show that it trains, not what)"
    return f"{title}\n{_format_table(('step', 'loss', 'grad norm', *names), rows)}"


def _format_answers(answers: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            answer["model"],
            " + ".join(answer["inputs"]) or "-",
            answer["prompt"] or "(caption)",
            answer["text"].replace("\n", " ")[:LONGEST_ANSWER],
        )
        for answer in answers
    ]
    title = "generate (random encoder, a few steps of training: the words mean nothing yet)"
    return f"{title}\n{_format_table(('model', 'inputs', 'prompt', 'answer'), rows)}"


def _format_scores(evaluation: Mapping[str, Any]) -> str:
    rows = []
    for task, counts in evaluation["tasks"].items():
        answered = f"{counts['answered']} of {counts['questions']}"
        for measure, (low, high) in evaluation["intervals"].get(task, {}).items():
            mean = evaluation["results"][task][f"{measure},none"]
            rows.append((task, answered, measure, f"{mean:.1f}", f"{low:.1f} to {high:.1f}"))
        for measure, why in evaluation["not_computed"].get(task, {}).items():
            rows.append((task, answered, measure, "not computed", why))
    title = "evaluate: the tuned model (the scores mean nothing yet), and compared with the aligned"
    table = _format_table(("task", "answered", "measure", "score", "95% interval"), rows)
    seen = sum(evaluation["overlap"]["found"].values())
    left = f"without the {seen} questions about pictures that a training set has copies of:"
    return "\n".join(
        [title, table, *evaluation["compared"], left, *evaluation["overlap"]["without"]]
    )


def _format_number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _format_table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join(_format_rows([heading, *rows]))


def _format_rows(rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        yield "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
