"""Which samples a step went wrong over, and what the policy makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from one_rank import ONE_RANK
from small_model import pack, sample

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.run_files import EXCLUDED
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.excluded_samples import ExcludedSamples
from onellm_dist.train.recovery import check_rollbacks_left
from onellm_dist.train.stability.monitor import Anomaly
from onellm_dist.train.stability.offending_samples import (
    MicroBatchLosses,
    find_offending_samples,
    format_samples,
    to_event_fields,
)
from onellm_dist.train.stability.policy import RollbackError, apply_policy

SPIKE = Anomaly("loss_spike", "loss 5")
NOT_FINITE = Anomaly("loss_not_finite", "the loss is not finite")


def make_losses(
    losses: dict[int, float], *, weights: dict[int, float] | None = None, loss: float | None = None
) -> MicroBatchLosses:
    """A micro-batch of samples number -> cross-entropy of its two supervised tokens."""
    batch = pack([sample(number, ("a",) if number % 2 else ("b",)) for number in losses])
    for place, number in enumerate(losses):
        batch.weights[place] = (weights or {}).get(number, 1.0)
    nll = torch.tensor([value for value in losses.values() for _ in range(2)])
    index = torch.repeat_interleave(torch.arange(len(losses)), 2)
    total = torch.tensor(float(nll.sum()) if loss is None else loss)
    return MicroBatchLosses(batch, total, nll, index)


def find(*parts: MicroBatchLosses, anomaly: Anomaly = SPIKE) -> list[str]:
    return [s.sample for s in find_offending_samples(parts, anomaly, ONE_RANK)]


def test_the_sample_that_is_not_finite_is_named_with_rank_and_modality() -> None:
    parts = [make_losses({1: 2.0, 2: 2.1}), make_losses({3: float("nan"), 4: 2.0})]
    found = find_offending_samples(parts, NOT_FINITE, ONE_RANK)
    assert [(s.sample, s.rank, s.micro_batch, s.modality, s.nll) for s in found] == [
        ("s3", 0, 1, "a", None)
    ]
    assert "s3 (a, rank 0, not finite)" in format_samples(found)
    fields = to_event_fields(found)
    assert fields["offending_samples"][0]["sample"] == "s3"
    assert fields["offending_samples_total"] == 1


def test_an_outlier_offends_else_the_whole_step_does() -> None:
    assert find(make_losses({1: 2.0, 2: 2.1, 3: 9.0, 4: 2.2})) == ["s3"]
    assert len(find(make_losses({1: 5.0, 2: 5.1, 3: 5.2, 4: 4.9}))) == 4
    gradient = Anomaly("gradient_not_finite", "")
    assert len(find(make_losses({1: 5.0, 2: 5.1}), anomaly=gradient)) == 2
    assert find(make_losses({1: 2.0, 3: 9.0, 4: 2.2}, weights={3: 0.0})) == ["s4", "s1"]
    only_sum = [make_losses({1: 2.0, 2: 2.0}, loss=float("inf"))]
    found = find_offending_samples(only_sum, NOT_FINITE, ONE_RANK)
    assert [s.nll for s in found] == [None, None], "no sample stands out: all are listed"


def test_excluded_samples_are_read_back_counted_and_never_twice(tmp_path: Path) -> None:
    names = find(make_losses({1: 2.0, 2: 2.1, 3: 9.0, 4: 2.2}))
    excluded = ExcludedSamples(tmp_path, writes=True)
    assert excluded.exclude(7, SPIKE.reason, names) == 1
    assert excluded.exclude(7, SPIKE.reason, names) == 0
    with (tmp_path / EXCLUDED).open("a") as out:
        out.write('{"step": 9, "sample_i')
    again = ExcludedSamples(tmp_path, writes=True)
    assert again.known == {"s3": "excluded: loss 5, in step 7"} and again.rollbacks == 1


def test_too_many_rollbacks_stop_the_run() -> None:
    offending = find_offending_samples(
        [make_losses({1: 2.0, 3: float("nan")})], NOT_FINITE, ONE_RANK
    )
    error = RollbackError(4, NOT_FINITE, offending)
    check_rollbacks_left(error, done=0, allowed=1)
    with pytest.raises(OneLLMError, match="max_rollbacks is 0") as raised:
        check_rollbacks_left(error, done=0, allowed=0)
    assert "s3" in str(raised.value)


def test_the_policy_skips_stops_or_rolls_back(tmp_path: Path) -> None:
    events = Events(tmp_path, enabled=True)
    offending = find_offending_samples(
        [make_losses({1: 2.0, 2: 2.1, 3: 9.0, 4: 2.2})], SPIKE, ONE_RANK
    )
    apply_policy("skip", 3, SPIKE, offending, events)
    with pytest.raises(OneLLMError, match=r"stability\.policy is stop"):
        apply_policy("stop", 4, SPIKE, offending, events)
    with pytest.raises(RollbackError) as raised:
        apply_policy("rollback", 5, SPIKE, offending, events)
    assert (raised.value.step, raised.value.offending) == (5, offending)
    skipped, stopped = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (skipped["event"], skipped["step"], skipped["anomaly"]) == (
        "step_skipped",
        3,
        "loss_spike",
    )
    assert skipped["micro_batches"] == [{"rank": 0, "micro_batch": 0, "samples": ["s3"]}]
    assert (stopped["event"], stopped["step"]) == ("stability_stop", 4)
