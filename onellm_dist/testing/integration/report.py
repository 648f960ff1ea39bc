"""What a rehearsal must have shown, and the table that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onellm_dist.common.progress import seconds_text
from onellm_dist.modalities import all_modalities
from onellm_dist.testing.integration.media import FEWEST

TRAINED = {"align": ("projectors", "tokenizers", "upm"), "tune": ("llm",)}
"""Parts of the model that a stage trains; the others must not move by a bit."""


def checks(facts: Mapping[str, Any], *, steps: int) -> dict[str, bool]:
    """Name to whether it held; a phase that was not reached did not hold."""
    media, shares = facts.get("media", {}), facts.get("weights_changed", {})
    answers = facts.get("generate", [])
    found = {
        "no phase failed": "error" not in facts,
        f"at least {FEWEST} real samples of every modality": bool(media)
        and all(len(media.get(m, ())) >= FEWEST for m in all_modalities()),
    }
    for stage, trained in TRAINED.items():
        rows = facts.get(stage, [])
        parts = shares.get(stage, {})
        found[f"{stage}: {steps} optimizer steps, every loss and gradient norm finite"] = len(
            rows
        ) == steps and all(
            math.isfinite(row.get("loss") or math.nan)
            and math.isfinite(row.get("grad_norm") or math.nan)
            for row in rows
        )
        found[f"{stage}: every modality was trained on"] = bool(rows) and all(
            any((row.get("loss_by_modality") or {}).get(m) is not None for row in rows)
            for m in all_modalities()
        )
        found[f"{stage}: {', '.join(trained)} moved"] = bool(parts) and all(
            parts.get(part, 0) > 0.5 for part in trained
        )
        found[f"{stage}: everything else is bit for bit as before"] = bool(parts) and all(
            share == 0 for part, share in parts.items() if part not in trained
        )
    inputs = [tuple(name.split()[0] for name in row["inputs"]) for row in answers]
    found["generate answered for every modality and a joint input"] = all(
        (m,) in inputs for m in all_modalities()
    ) and any(len(names) > 1 for names in inputs)
    found[f"at most {facts['limit_gib']:g} GiB of memory"] = (
        0 < facts["peak_gib"] <= facts["limit_gib"]
    )
    return found


def print_report(facts: Mapping[str, Any]) -> None:
    """The table, plain text."""
    print()
    rows = [
        (p["phase"], seconds_text(p["seconds"]), f"{p['peak_gib']:.1f} GiB")
        for p in facts["phases"]
    ]
    _table(
        ("phase", "time", "peak memory"),
        [*rows, ("whole", seconds_text(facts["seconds"]), f"{facts['peak_gib']:.1f} GiB")],
    )
    for stage in TRAINED:
        if steps := facts.get(stage):
            print(
                f"\n{stage}: loss by step and modality (a few steps: it shows that the path works, not that anything was learnt)"
            )
            names = [
                m
                for m in all_modalities()
                if any(m in (s.get("loss_by_modality") or {}) for s in steps)
            ]
            _table(
                ("step", "loss", "grad norm", *names),
                [
                    (
                        s["step"],
                        _number(s.get("loss")),
                        _number(s.get("grad_norm")),
                        *(_number((s.get("loss_by_modality") or {}).get(m)) for m in names),
                    )
                    for s in steps
                ],
            )
    if facts.get("generate"):
        print("\ngenerate (random encoder, a few steps of training: the words mean nothing yet)")
        _table(
            ("model", "inputs", "prompt", "answer"),
            [
                (
                    g["model"],
                    " + ".join(g["inputs"]) or "-",
                    g["prompt"] or "(caption)",
                    g["text"].replace("\n", " ")[:90],
                )
                for g in facts["generate"]
            ],
        )
    print()
    for name, held in facts["checks"].items():
        print(f"{'yes' if held else 'NO ':4}{name}")
    ending = "The rehearsal ended well" if facts["ok"] else "The rehearsal FAILED"
    print(f"\n{ending}: {seconds_text(facts['seconds'])}, {facts['peak_gib']:.1f} GiB at most.")


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [[str(c) for c in row] for row in [heading, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heading))]
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
