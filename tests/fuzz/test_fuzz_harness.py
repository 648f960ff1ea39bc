"""The harness itself: each outcome is recognised, cases repeat, and the corpus stays fixed."""

from __future__ import annotations

import ctypes
import random
import time

import pytest
from guided import VARIABLE
from harness import fuzz
from mutators import flip_bit, mutate_any, mutate_bytes, mutate_json, mutate_lines
from outcomes import CRASH, FINE, HANG, MEMORY, RAW, REFUSED, WRONG

from onellm_dist.common.errors import UsageError


def behave(data: bytes) -> None:
    """Does what the first byte says."""
    kind = data[0]
    if kind == 1:
        raise UsageError("refused", "why", "do")
    if kind == 2:
        raise KeyError("raw")
    if kind == 3:
        assert data == b"another", "another value"
    elif kind == 4:
        time.sleep(60)
    elif kind == 5:
        bytearray(4 << 30)
    elif kind == 6:
        ctypes.string_at(0)
    elif kind == 7:
        raise UsageError("", "", "")


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [(0, FINE), (1, REFUSED), (2, RAW), (3, WRONG), (4, HANG), (5, MEMORY), (6, CRASH), (7, RAW)],
)
def test_each_outcome_is_recognised(kind: int, outcome: str) -> None:
    """A bad case costs itself: the cases behind it run too."""
    made = iter(())

    def mutate(rng: random.Random, seeds: object) -> bytes:
        return bytes([kind]) if next(made, None) is None else b"\0"

    seconds = 0.3 if kind == 4 else 10  # on a busy machine the first case is slow
    report = fuzz("harness", behave, [b"\0"], mutate, cases=2, seconds=seconds)
    assert report.counts == {outcome: 2}
    assert [f.outcome for f in report.failures] == [outcome] * 2 * (outcome not in (FINE, REFUSED))


def test_a_report_with_a_failure_is_not_clean() -> None:
    report = fuzz("harness", behave, [b"\0"], lambda r, s: b"\x02", cases=3)
    with pytest.raises(AssertionError, match=r"KeyError: 'raw' at test_fuzz_harness.py:\d+"):
        report.require_clean()
    with pytest.raises(AssertionError, match="3 fine"):
        fuzz("harness", behave, [b"\0"], lambda r, s: b"\0", cases=3).require_clean()


@pytest.mark.parametrize(
    "mutate",
    [flip_bit, mutate_bytes, mutate_json, mutate_lines, mutate_any(mutate_bytes, mutate_json)],
)
def test_cases_repeat_and_differ(mutate: object) -> None:
    seeds = [b'{"a": [1, 2, "x"], "b": {"c": null}}', b'["another", 7]']
    made = [[mutate(random.Random(i), seeds) for i in range(300)] for _ in range(2)]  # type: ignore[operator]
    assert made[0] == made[1]
    assert len(set(made[0])) > 100


def stumble(data: bytes) -> None:
    """Fail at one of four billion beginnings."""
    for place, right in enumerate(b"DEEP"):
        if place >= len(data):
            raise UsageError(f"there is no byte {place}")
        if data[place] != right:
            return
    raise KeyError("found")


@pytest.mark.soak
def test_a_search_by_coverage_finds_what_chance_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atheris")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not fuzz("stumble", stumble, [b"DOOR"], flip_bit, cases=200).failures
    monkeypatch.setenv(VARIABLE, "20")
    report = fuzz("stumble", stumble, [b"DOOR"], flip_bit, cases=200)
    [failure] = report.failures
    assert failure.outcome == RAW and failure.data[:4] == b"DEEP"
    assert report.counts[REFUSED] > 200
