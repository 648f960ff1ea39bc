"""Findings about what the model learns: loss, gradients, skipped steps and samples, experts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from onellm_dist.common.counts import format_count
from onellm_dist.report.entries import Entry, to_number
from onellm_dist.report.facts import RunFacts
from onellm_dist.report.findings.finding import Finding

ANOMALY_TEXTS = {
    "loss_not_finite": "the loss was not finite",
    "gradient_not_finite": "a gradient was not finite",
    "loss_spike": "a loss spike",
    "gradient_spike": "a gradient spike",
    "not_finite": "a value was not finite",
}
UNDERUSED = 0.02
"""An expert that gets a smaller share of the routing weight is underused."""


def check_loss(facts: RunFacts) -> Iterator[Finding]:
    """A loss that rises, in training or in validation."""
    losses = [
        (int(line["step"]), to_number(line.get("loss")))
        for line in facts.records.steps
        if isinstance(line.get("loss"), (int, float))
    ]
    if len(losses) >= 40:
        tenth = len(losses) // 10
        windows = [
            statistics.median(loss for _, loss in losses[i : i + tenth])
            for i in range(0, len(losses) - tenth + 1, tenth)
        ]
        best = min(windows)
        if windows[-1] > 1.2 * best and windows[-1] - best > 0.05:
            step = losses[windows.index(best) * tenth][0]
            yield Finding(
                "bad",
                f"The loss is rising: {windows[-1]:.3f} over the last {tenth} steps, {best:.3f} "
                f"at its best near step {step}.",
            )
    validations = [
        (int(line["steps_done"]), to_number(line.get("loss")))
        for line in facts.records.validation
        if isinstance(line.get("loss"), (int, float))
    ]
    if len(validations) >= 3:
        done, lowest = min(validations, key=lambda pair: pair[1])
        if validations[-1][1] > 1.05 * lowest:
            yield Finding(
                "warn",
                f"The validation loss was lowest after {format_count(done, 'step')} "
                f"({lowest:.3f}) and is {validations[-1][1]:.3f} now.",
            )


def check_skipped_steps(facts: RunFacts) -> Iterator[Finding]:
    """Steps whose update was discarded, by reason."""
    skipped = facts.incidents.skipped_steps
    if not skipped:
        return
    anomalies = Counter(str(event.get("anomaly", "not_finite")) for event in skipped)
    reasons = ", ".join(
        ANOMALY_TEXTS.get(anomaly, anomaly) + (f" ({count})" if len(anomalies) > 1 else "")
        for anomaly, count in anomalies.most_common()
    )
    yield Finding(
        "warn",
        f"{format_count(len(skipped), 'step was', 'steps were')} skipped: {reasons}"
        f"{_describe_common_modality(skipped)} (the last: step {skipped[-1].get('step')}); "
        "events.jsonl names the samples.",
    )


def _describe_common_modality(skipped: Sequence[Entry]) -> str:
    """The modality that has offending samples in every skipped step, if there is one.

    The model may never be trained on it.
    """
    modalities = [
        {
            str(sample.get("modality"))
            for sample in event.get("offending_samples") or ()
            if isinstance(sample, dict)
        }
        for event in skipped
    ]
    common = sorted(set.intersection(*modalities))
    if not common or len(skipped) < 2:
        return ""
    return f", each time with offending samples of {' and of '.join(common)}"


def check_gradients(facts: RunFacts) -> Iterator[Finding]:
    """Gradient spikes, and gradients that are clipped most of the time."""
    spikes = facts.incidents.gradient_spikes
    if spikes:
        worst = max(spikes, key=lambda spike: spike.norm / spike.median_before)
        yield Finding(
            "note",
            f"{format_count(len(spikes), 'gradient norm is', 'gradient norms are')} far above "
            f"those before; the worst, at step {worst.step}: {worst.norm:.3g} after "
            f"{worst.median_before:.3g}.",
        )
    clip = facts.records.get_setting("optim", "grad_clip")
    steps = facts.records.steps
    norms = [
        to_number(line.get("grad_norm"))
        for line in steps[len(steps) // 10 :]
        if line.get("grad_norm") is not None
    ]
    if isinstance(clip, (int, float)) and clip > 0 and len(norms) >= 40:
        share = sum(norm > clip for norm in norms) / len(norms)
        if share > 0.5:
            yield Finding(
                "note",
                f"{share:.0%} of the gradients are clipped (optim.grad_clip={clip:g}): the "
                "effective learning rate is lower than optim.lr.",
            )


def check_skipped_samples(facts: RunFacts) -> Iterator[Finding]:
    """Samples that could not be read."""
    skipped = facts.records.skipped_samples
    if not skipped:
        return
    limit = facts.records.get_setting("data", "max_skipped_samples")
    reasons = Counter(str(entry.get("reason", "?")).split(":")[0] for entry in skipped)
    others = " and others" if len(reasons) > 1 else ""
    text = (
        f"{format_count(len(skipped), 'sample')} could not be read "
        f"({reasons.most_common(1)[0][0]}{others})"
    )
    if isinstance(limit, int):
        near = len(skipped) > limit / 2
        yield Finding("warn" if near else "note", f"{text}; more than {limit} stop the run.")
    else:
        yield Finding("note", f"{text}.")


def check_experts(facts: RunFacts) -> Iterator[Finding]:
    """Experts that get almost no routing weight."""
    load: Entry = next(
        (
            line["router_load"]
            for line in reversed(facts.records.steps)
            if isinstance(line.get("router_load"), dict)
        ),
        {},
    )
    underused = [
        f"expert {expert + 1} for {modality}"
        for modality, row in load.items()
        if isinstance(row, list)
        for expert, weight in enumerate(row)
        if to_number(weight) < UNDERUSED
    ]
    if underused:
        yield Finding(
            "warn",
            f"Experts that get less than {UNDERUSED:.0%} of the routing weight: "
            f"{', '.join(underused[:4])}.",
        )


def check_broken_lines(facts: RunFacts) -> Iterator[Finding]:
    """Lines of the run's files that cannot be read."""
    broken = facts.records.broken_lines
    if broken:
        files = ", ".join(f"{name} ({count})" for name, count in broken.items())
        yield Finding(
            "note",
            f"Lines that cannot be read were ignored: {files}. A kill leaves half a line; more "
            "of them point to a failing disk.",
        )
