"""What `stability.policy` makes of a step that was not applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onellm_dist.common.errors import OneLLMError
from onellm_dist.train.records.events import Events
from onellm_dist.train.stability.monitor import Anomaly
from onellm_dist.train.stability.offending_samples import (
    OffendingSample,
    format_samples,
    to_event_fields,
)


class RollbackError(Exception):
    """A step must be undone; every rank raises it together.

    Args:
        step: index of the step.
        anomaly: what was wrong with it.
        offending: the samples to exclude.
    """

    def __init__(self, step: int, anomaly: Anomaly, offending: Sequence[OffendingSample]) -> None:
        super().__init__(f"step {step}: {anomaly.reason}")
        self.step = step
        self.anomaly = anomaly
        self.offending = offending


def apply_policy(
    policy: str,
    step: int,
    anomaly: Anomaly,
    offending: Sequence[OffendingSample],
    events: Events,
) -> None:
    """Skip the step, or raise. Called by all ranks, with equal arguments.

    Args:
        policy: `stability.policy`: `skip`, `rollback` or `stop`.
        step: index of the step.
        anomaly: what was wrong with it.
        offending: the samples to which the anomaly points.
        events: where a skipped step, or a stop, is recorded.

    Raises:
        RollbackError: the policy is `rollback`.
        OneLLMError: the policy is `stop`.
    """
    if policy == "rollback":
        raise RollbackError(step, anomaly, offending)
    if policy == "stop":
        events.write(
            "stability_stop",
            step=step,
            reason=anomaly.reason,
            anomaly=anomaly.kind,
            **to_event_fields(offending),
        )
        raise OneLLMError(
            f"step {step}: {anomaly.reason}; the offending samples: {format_samples(offending)}",
            "stability.policy is stop: the step was not applied.",
            "see events.jsonl for the samples; set stability.policy=skip or rollback to continue "
            "without them.",
        )
    events.write(
        "step_skipped",
        step=step,
        reason=anomaly.reason,
        anomaly=anomaly.kind,
        micro_batches=_group_by_micro_batch(offending),
        **to_event_fields(offending),
        message=f"step {step} skipped on all ranks: {anomaly.reason}: {format_samples(offending)}",
    )


def _group_by_micro_batch(offending: Sequence[OffendingSample]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, int], list[str]] = {}
    for sample in offending:
        groups.setdefault((sample.rank, sample.micro_batch), []).append(sample.sample)
    return [
        {"rank": rank, "micro_batch": index, "samples": names}
        for (rank, index), names in groups.items()
    ]
