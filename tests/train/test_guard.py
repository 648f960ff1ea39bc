"""The guard's arithmetic, the samples to blame, marks, and the watchdog's verdict: no processes."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_model import pack, sample

from onellm_dist.common.errors import OneLLMError
from onellm_dist.config.schema import StabilitySection
from onellm_dist.train.callbacks.watchdog import (
    HANGS,
    Watchdog,
    in_collective,
    put_hangs_aside,
    suspected_ranks,
)
from onellm_dist.train.heartbeat import InFlight
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.skipped_samples import MARKS
from onellm_dist.train.stability.checks import Guard, Verdict, robust_z
from onellm_dist.train.stability.offending_samples import Part, describe, find_culprits, say
from onellm_dist.train.stability.rollback import Marks


class Alone:
    """A world of one rank that has no process group."""

    rank, world_size, is_rank_zero = 0, 1, True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None


ALONE: Any = Alone()


def guard(**keys: Any) -> Guard:
    return Guard(
        StabilitySection(**{"window": 16, "threshold": 8.0, **keys}), max_skipped_samples=5
    )


def feed(one: Guard, losses: list[float]) -> None:
    for loss in losses:
        assert judge(one, loss) is None
        one.keep(loss, norm_of(loss))


def norm_of(loss: float) -> float:
    return 1.0 + 0.1 * (loss - 2.0)


def judge(one: Guard, loss: float) -> Verdict | None:
    """With a norm that is nothing special."""
    return one.judge(loss, norm_of(loss) if abs(loss) < 5 else 1.0)


def noisy(count: int, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [2.0 + generator.gauss(0, 0.1) for _ in range(count)]


def test_z_is_in_robust_standard_deviations() -> None:
    window = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert robust_z(3.0, window, 0.0) == 0
    assert robust_z(3.0 + 1.4826, window, 0.0) == pytest.approx(1.0), (
        "the outlier in the window does not count"
    )
    assert robust_z(4.0, [3.0] * 5, 0.5) == 2.0, "the floor"


def test_a_leap_of_the_loss_is_seen_and_noise_and_falls_are_not() -> None:
    one = guard()
    feed(one, noisy(200))
    assert judge(one, 0.5) is None
    verdict = judge(one, 4.0)
    assert verdict is not None and verdict.kind == "loss_spike"
    assert "4" in verdict.reason and "median" in verdict.reason


def test_nothing_is_a_leap_before_there_is_something_to_compare_with_or_with_threshold_zero() -> (
    None
):
    one = guard()
    feed(one, noisy(7))
    assert one.judge(1e6, 1e6) is None
    off = guard(threshold=0)
    feed(off, noisy(50))
    assert off.judge(1e6, 1e6) is None
    for loss, norm in (
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (2.0, float("nan")),
        (2.0, float("inf")),
    ):
        assert off.judge(loss, norm) is not None, "not finite is never let through"


def test_a_leap_of_the_gradient_norm_is_seen_and_noise_and_falls_are_not() -> None:
    one = guard()
    feed(one, noisy(50))
    for norm in (1e-6, 0.5, 2.0, 5.0):
        assert one.judge(2.0, norm) is None
    verdict = one.judge(2.0, 1e4)
    assert verdict is not None and verdict.kind == "gradient_spike" and "1e+04" in verdict.reason
    verdict = one.judge(2.0, float("inf"))
    assert verdict is not None and verdict.kind == "gradient_not_finite"


def test_what_is_thrown_away_does_not_move_the_window() -> None:
    one = guard()
    feed(one, noisy(50))
    for _ in range(40):
        assert judge(one, 4.0) is not None and one.judge(2.0, 1e4) is not None
        one.count(0, applied=True, new_skipped_samples=0)


def test_a_resumed_guard_decides_as_the_first_one_would() -> None:
    one = guard()
    feed(one, noisy(50))
    again = Guard(
        StabilitySection(window=16, threshold=8.0), 5, 0, json.loads(json.dumps(one.state()))
    )
    for loss in (2.2, 2.5, 2.7, 2.9, 3.2):
        assert judge(one, loss) == judge(again, loss)
    assert again.state() == one.state()


def part(
    losses: dict[int, float], *, weights: dict[int, float] | None = None, loss: float | None = None
) -> Part:
    """A micro-step of samples number -> cross-entropy of its two supervised tokens."""
    batch = pack([sample(number, ("a",) if number % 2 else ("b",)) for number in losses])
    for place, number in enumerate(losses):
        batch.weights[place] = (weights or {}).get(number, 1.0)
    nll = torch.tensor([value for value in losses.values() for _ in range(2)])
    index = torch.repeat_interleave(torch.arange(len(losses)), 2)
    return Part(batch, torch.tensor(float(nll.sum()) if loss is None else loss), nll, index)


def test_the_sample_that_is_not_finite_is_named_with_rank_and_modality() -> None:
    verdict = Verdict("loss_not_finite", "the loss is not finite")
    parts = [part({1: 2.0, 2: 2.1}), part({3: float("nan"), 4: 2.0})]
    found = find_culprits(parts, verdict, ALONE)
    assert [(s.sample, s.rank, s.micro_batch, s.modality, s.nll) for s in found] == [
        ("s3", 0, 1, "a", None)
    ]
    assert "s3 (a, rank 0, not finite)" in say(found)
    assert describe(found)["samples"][0]["sample"] == "s3" and describe(found)["samples_total"] == 1


def test_a_sample_that_stands_out_is_to_blame_for_a_leap_else_the_whole_step_is() -> None:
    verdict = Verdict("loss_spike", "loss 5")
    assert [
        s.sample for s in find_culprits([part({1: 2.0, 2: 2.1, 3: 9.0, 4: 2.2})], verdict, ALONE)
    ] == ["s3"]
    assert len(find_culprits([part({1: 5.0, 2: 5.1, 3: 5.2, 4: 4.9})], verdict, ALONE)) == 4
    assert (
        len(find_culprits([part({1: 5.0, 2: 5.1})], Verdict("gradient_not_finite", ""), ALONE)) == 2
    )
    assert [
        s.sample
        for s in find_culprits([part({1: 2.0, 3: 9.0, 4: 2.2}, weights={3: 0.0})], verdict, ALONE)
    ] == ["s4", "s1"]
    blind = find_culprits(
        [part({1: 2.0, 2: 2.0}, loss=float("inf"))], Verdict("loss_not_finite", ""), ALONE
    )
    assert [s.nll for s in blind] == [None, None], (
        "no sample tells: the micro-step's samples are suspected"
    )


def test_marks_are_read_back_counted_and_never_twice(tmp_path: Path) -> None:
    verdict = Verdict("loss_spike", "loss 5")
    culprits = find_culprits([part({1: 2.0, 2: 2.1, 3: 9.0, 4: 2.2})], verdict, ALONE)
    marks = Marks(tmp_path, main=True)
    assert marks.add(7, verdict, culprits, ALONE) == 1
    assert marks.add(7, verdict, culprits, ALONE) == 0
    with (tmp_path / MARKS).open("a") as out:
        out.write('{"step": 9, "sample_i')
    again = Marks(tmp_path, main=True)
    assert again.known == {"s3": "guard: loss 5, in step 7"} and again.rollbacks == 1


def about(rank: int, beats: int, *, waits: bool) -> dict[str, Any]:
    return {"rank": rank, "beats": beats, "in_collective": waits}


@pytest.mark.parametrize(
    ("found", "world", "suspected"),
    [
        ({0: about(0, 9, waits=True), 1: about(1, 9, waits=False)}, 2, [1]),
        ({0: about(0, 9, waits=True), 1: about(1, 8, waits=True)}, 2, [1]),
        ({0: about(0, 9, waits=False), 1: about(1, 8, waits=False)}, 2, [1]),
        ({0: about(0, 9, waits=True)}, 3, [1, 2]),
        ({0: about(0, 9, waits=True), 1: about(1, 9, waits=True)}, 2, []),
        ({0: about(0, 9, waits=False)}, 1, [0]),
    ],
    ids=["waits_for_nobody", "fewest_beats", "behind_on_gpu", "silent", "nobody", "alone"],
)
def test_who_is_suspected(
    found: dict[int, dict[str, Any]], world: int, suspected: list[int]
) -> None:
    assert suspected_ranks(found, world)[0] == suspected


def test_a_thread_in_a_collective_is_told_from_one_that_is_not() -> None:
    assert not in_collective(sys._current_frames(), threading.get_ident())

    def frame(path: str, back: Any = None) -> Any:
        return SimpleNamespace(f_code=SimpleNamespace(co_filename=path), f_back=back)

    gather = frame("/lib/deepspeed/runtime/zero/partition_parameters.py")
    assert in_collective({1: frame("/lib/torch/nn/linear.py"), 2: gather}, 3)
    assert in_collective({1: frame("/lib/torch/distributed/distributed_c10d.py")}, 3)
    assert in_collective({1: frame("/lib/deepspeed/utils/nvtx.py", back=gather)}, 3)
    for waits in (
        "torch/cuda/streams.py",
        "torch/cuda/__init__.py",
        "onellm_dist/train/totals.py",
        "onellm_dist/train/engine/fsdp/engine.py",
    ):
        assert in_collective(
            {1: frame(f"/lib/{waits}", back=frame("/lib/onellm_dist/train/loop.py"))}, 3
        ), "on a GPU"
    assert not in_collective({1: frame("/lib/onellm_dist/train/loop.py")}, 3)
    assert not in_collective({1: frame("/lib/torch/nn/linear.py", back=gather)}, 3), (
        "a module that runs under ZeRO waits for nobody"
    )
    assert not in_collective({1: frame("/lib/torch/nn/linear.py"), 3: gather}, 3), (
        "the watching thread does not count"
    )


def test_a_rank_that_came_to_the_sums_of_the_step_is_ahead_of_one_in_its_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the sums are where ranks wait for one that is late; it must be the one with the fewest beats."""
    from onellm_dist.train import trainer as loop

    in_flight, phases = InFlight(), []

    class ComeToTheSumsError(Exception):
        pass

    micro = SimpleNamespace(step=4, index=0, last=True, global_valid_tokens=1)

    def seen(*_: Any, **__: Any) -> Any:
        phases.append((in_flight.phase, in_flight.beats))
        return torch.zeros(()), torch.zeros(1), torch.zeros(1, dtype=torch.int64)

    run: Any = SimpleNamespace(
        in_flight=in_flight,
        new_totals=lambda: SimpleNamespace(add=lambda *_: None),
        engine=SimpleNamespace(forward=seen, backward=seen),
        plan=SimpleNamespace(step=lambda *_: SimpleNamespace(ranks=[[micro]])),
        dist=SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu")),
    )

    def agree(*_: Any) -> None:
        seen()
        raise ComeToTheSumsError

    monkeypatch.setattr(loop, "_agree", agree)
    with pytest.raises(ComeToTheSumsError):
        loop._step(run, 4, iter([(micro, pack([sample(1, ("a",))]))]))  # type: ignore[arg-type, list-item]
    assert phases == [("forward", 2), ("backward", 3), ("agree", 4)]


def watch(run_dir: Path, ended: threading.Event, **keys: Any) -> Watchdog:
    config = StabilitySection(hang_minutes=0.005, first_step_minutes=0.01, **keys)
    return Watchdog(run_dir, 0, 1, config, ExitFile(run_dir, 0), end=lambda code: ended.set())


def test_a_watchdog_stays_quiet_while_there_is_progress_and_bites_when_there_is_none(
    tmp_path: Path,
) -> None:
    ended = threading.Event()
    with watch(tmp_path, ended, validation_minutes=60.0) as dog:
        assert dog.limit() == pytest.approx(0.6)
        for _ in range(10):
            dog._in_flight.beat("forward", step=4)
            time.sleep(0.1)
        dog._in_flight.first_step_done = True
        assert dog.limit() == pytest.approx(0.3)
        dog._in_flight.beat("validation")
        assert dog.limit() == 3600
        time.sleep(1)
        assert not ended.is_set()
        dog._in_flight.beat("forward", step=5)
        assert ended.wait(10)
    report = (tmp_path / HANGS / "rank-00000.txt").read_text()
    assert "step: 5" in report and "test_guard.py" in report, "the stack of this very line"
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["status"], found["kind"], found["failed_step"], found["suspected_rank"]) == (
        "failed",
        "hang",
        5,
        0,
    )
    assert "no progress" in found["reason"]
    put_hangs_aside(tmp_path)
    assert (
        not (tmp_path / HANGS).exists()
        and len(list(tmp_path.glob(f"{HANGS}-*/rank-00000.txt"))) == 1
    )


def test_nobody_watches_with_hang_minutes_zero(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, StabilitySection(hang_minutes=0), ExitFile(tmp_path, 0)) as dog:
        assert not dog._thread.is_alive()


def test_too_many_roll_backs_and_nothing_left_to_mark_stop_the_run(tmp_path: Path) -> None:
    from onellm_dist.train.stability.rollback import RollBackError, roll_back

    culprits = find_culprits(
        [part({1: 2.0, 3: float("nan")})], Verdict("loss_not_finite", "bad"), ALONE
    )
    marks = Marks(tmp_path, main=True)
    run: Any = SimpleNamespace(
        checkpoints=SimpleNamespace(wait=lambda: None),
        config=SimpleNamespace(stability=StabilitySection(max_rollbacks=0)),
        marks=marks,
    )
    with pytest.raises(OneLLMError, match="max_rollbacks is 0") as raised:
        roll_back(run, RollBackError(4, Verdict("loss_not_finite", "bad"), culprits))
    assert "s3" in str(raised.value)
