"""A checkpoint that takes longer than the job's grace period is warned of when it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.train.callbacks.grace_period import (
    GRACE_PERIOD,
    GracePeriodWatch,
    grace_period_seconds,
)
from onellm_dist.train.records.metrics import EVENTS, Events


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / EVENTS).read_text().splitlines()]


def test_a_save_longer_than_the_notice_is_warned_of_and_a_shorter_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell = GracePeriodWatch(Events(tmp_path, main=True).write, 30.0)
    tell("checkpoint", step=5, folder="step-00000005", seconds=29.0)
    tell("validation", step=5, seconds=100.0)
    assert [e["event"] for e in events(tmp_path)] == ["checkpoint", "validation"]
    tell("checkpoint", step=10, folder="step-00000010", seconds=31.5)
    assert (
        events(tmp_path)[-1]["event"] == "grace_period_short"
        and events(tmp_path)[-1]["grace_period_seconds"] == 30.0
    )
    assert (
        "the checkpoint of step 10 took 31.5 s, the job's grace period is 30 s"
        in capsys.readouterr().out
    )


def test_without_a_notice_nothing_is_compared(tmp_path: Path) -> None:
    GracePeriodWatch(Events(tmp_path, main=True).write, None)("checkpoint", step=5, seconds=1e6)
    assert [e["event"] for e in events(tmp_path)] == ["checkpoint"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("300", 300.0), ("", None), ("soon", None), ("0", None), ("-5", None)]
)
def test_the_notice_is_what_the_job_script_says(text: str, seconds: float | None) -> None:
    assert grace_period_seconds({GRACE_PERIOD: text}) == seconds
    assert grace_period_seconds({}) is None
