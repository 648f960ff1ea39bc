"""`onellm samples`: steps to samples and back, against a plan that is walked step by step."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import DataSection, MixtureEntry
from onellm_dist.data.order import Order, derive_key
from onellm_dist.data.plan import Plan
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.train.records.data_phases import write_data_phases
from onellm_dist.train.records.sample_log import SampleLog
from onellm_dist.train.sample_log.command import samples_command
from onellm_dist.train.sample_log.exclude import exclude_command
from onellm_dist.train.sample_log.status import RunStatus
from onellm_dist.train.sample_log.stream import RunStream

STEPS, CHANGE, BATCH = 23, 9, 10
SIZES = {"a": 17, "b": 8, "c": 31}


def make(root: Path, name: str, samples: int) -> None:
    with DatasetWriter(root / name, name=name, modalities=(), max_samples=5) as writer:
        for number in range(samples):
            writer.add("train", f"{name}{number:03d}x", {"txt": b"a red cube"})


def plan_of(root: Path, mixture: dict[str, float]) -> Plan:
    entries = tuple(
        MixtureEntry(path=Path(name), weight=weight) for name, weight in mixture.items()
    )
    section = DataSection(root=root, mixture=entries, global_batch=BATCH, new_phase=True)
    return Plan.open(section, load_toy_tokenizer(), 3, (), show=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """The directory of a run of two data phases (b leaves, c comes), and the ids of every step."""
    root = tmp_path_factory.mktemp("samples")
    for name, samples in SIZES.items():
        make(root, name, samples)
    first, second = plan_of(root, {"a": 3, "b": 1}), plan_of(root, {"c": 2, "a": 1})
    assert second.follow(first.data_phases, CHANGE)
    ids = [
        plan.corpus.sample_ids(plan.samples(step))
        for step in range(STEPS)
        for plan in [first if step < CHANGE else second]
    ]
    run_dir = root / "run"
    for plan in (first, second):
        write_data_phases(
            run_dir / "samples",
            plan.data_phases,
            {d.name: d.location for d in plan.corpus.datasets},
        )
    recipe = {
        "train": {"steps": STEPS},
        "data": {
            "root": str(root),
            "mixture": [{"path": "c", "weight": 2}, {"path": "a", "weight": 1}],
        },
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(recipe))
    return run_dir, ids


@pytest.mark.parametrize("counts", [[40] * 37, [1], [0, 3, 0, 0, 5] * 9, [7] * 16])
def test_places_are_inverted(counts: list[int]) -> None:
    order = Order(counts, derive_key("inverse", len(counts)))
    epochs = np.asarray([0, 1, 5])
    for shard, count in enumerate(counts):
        for row in {0, count // 2, count - 1} if count else set():
            places = order.locate(order.find_positions(shard, row, epochs))
            assert (
                places.epoch.tolist(),
                set(places.shard.tolist()),
                set(places.row.tolist()),
            ) == ([0, 1, 5], {shard}, {row})


def test_the_samples_of_a_step_are_the_plans(run: tuple[Path, list[list[str]]]) -> None:
    run_dir, ids = run
    stream = RunStream(run_dir)
    assert [[use.sample_id for use in stream.list_samples(step)] for step in range(STEPS)] == ids


def test_the_steps_of_a_sample_are_all_there_are(run: tuple[Path, list[list[str]]]) -> None:
    run_dir, ids = run
    stream = RunStream(run_dir)
    found: dict[str, list[int]] = {}
    for step, names in enumerate(ids):
        for name in names:
            found.setdefault(name.partition("@")[0], []).append(step)
    for name, size in SIZES.items():
        for number in range(size):
            shard = f"train-{number // 5:06d}"
            known = next(
                (key for key in found if key.endswith(f"/{name}{number:03d}x")),
                f"{name}/{shard}/{name}{number:03d}x",
            )
            assert [use.step for use in stream.list_uses(stream.find_sample(known))] == found.get(
                known, []
            )
    assert any(len(steps) > 3 for steps in found.values()), "several epochs were asked for"


def test_a_sample_is_found_by_any_part_of_its_id_that_names_it(
    run: tuple[Path, list[list[str]]],
) -> None:
    stream = RunStream(run[0])
    whole = stream.find_sample("b004x").name
    assert whole.startswith("b/") and whole.endswith("/b004x")
    dataset, shard, key = whole.split("/")
    for part in (whole, whole[:-1], f"{shard}/{key}", f"{shard}/b004", "b004"):
        assert stream.find_sample(part).name == whole
    assert (
        stream.find_sample(f"{dataset}/{stream.find_sample('b007').shard_name}/b007").key == "b007x"
    )
    with pytest.raises(UsageError, match="may be"):
        stream.find_sample("b00")
    with pytest.raises(UsageError, match="no sample"):
        stream.find_sample("zebra")
    with pytest.raises(UsageError, match=r"0 \.\. 22"):
        stream.list_samples(STEPS)


def test_rebuilt_shards_are_not_answered_from(tmp_path: Path) -> None:
    make(tmp_path, "a", 6)
    plan = plan_of(tmp_path, {"a": 1})
    write_data_phases(tmp_path / "run" / "samples", plan.data_phases, {"a": str(tmp_path / "a")})
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump(
            {"train": {"steps": 2}, "data": {"root": str(tmp_path), "mixture": [{"path": "a"}]}}
        )
    )
    assert len(RunStream(tmp_path / "run").list_samples(0)) == BATCH
    (tmp_path / "a").rename(tmp_path / "old")
    make(tmp_path, "a", 7)
    with pytest.raises(Exception, match="its shards are not those"):
        RunStream(tmp_path / "run").list_samples(0)
    with pytest.raises(UsageError, match=r"data_phases\.json"):
        RunStream(tmp_path)


def test_what_became_of_steps(
    run: tuple[Path, list[list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """7 steps, then a resume at step 4 that does two: one skipped, one with a bad sample."""
    run_dir, ids = run
    live = tmp_path / "run"
    for name in ("config.yaml", "samples/data_phases.json", "samples/datasets.json"):
        (live / name).parent.mkdir(parents=True, exist_ok=True)
        (live / name).write_text((run_dir / name).read_text())
    first = SampleLog(live / "samples", rank=0)
    assert first.begin(0) == 0
    for step in range(7):
        first.record_step(step, {})
    second = SampleLog(live / "samples", rank=0)
    assert second.begin(4) == 3
    (live / "checkpoints" / "step-00000004").mkdir(parents=True)
    (live / "checkpoints" / "step-00000004" / "manifest.json").write_text("{}")
    second.record_step(4, {})
    second.record_step(5, {ids[5][2]: "torn"})
    (live / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "applied": s != 4}) + "\n" for s in range(6))
        + '{"step": 6, "app'
    )

    status = RunStatus(live)
    states = [tuple(status.get_status(step)) for step in range(8)]
    assert states == [
        ("trained", 0, True),
        ("trained", 0, True),
        ("trained", 0, True),
        ("trained", 0, True),
        ("skipped", 1, False),
        ("trained", 1, False),
        ("planned", 1, False),
        ("planned", 0, False),
    ]

    def ask(**question: Any) -> dict[str, Any]:
        given = {"step": None, "key": None} | question
        assert samples_command(live, given["step"], given["key"], as_json=True) == 0
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    answer = ask(step=5)
    assert [row["id"] for row in answer["samples"]] == ids[5]
    assert [row["left_out"] for row in answer["samples"]] == [
        None,
        None,
        "torn",
        *[None] * (BATCH - 3),
    ]
    assert answer["state"] == "trained" and answer["times_lost"] == 1
    back = ask(key=ids[5][2])  # with its epoch
    assert [(row["step"], row["left_out"]) for row in back["uses"]] == [(5, "torn")]
    assert ask()["lost_steps"] == 3
    assert samples_command(live, None, ids[5][2].partition("@")[0], as_json=False) == 0
    assert "left out: torn" in capsys.readouterr().out


def test_a_hundred_thousand_steps_are_answered_in_seconds(tmp_path: Path) -> None:
    """2500 epochs of one small dataset beside a large share: nothing is replayed."""
    make(tmp_path, "a", 100)
    make(tmp_path, "b", 40)
    plan = plan_of(tmp_path, {"a": 0.25, "b": 0.75})
    write_data_phases(
        tmp_path / "run" / "samples",
        plan.data_phases,
        {d.name: d.location for d in plan.corpus.datasets},
    )
    mixture = [{"path": "a"}, {"path": "b"}]
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump(
            {"train": {"steps": 100_000}, "data": {"root": str(tmp_path), "mixture": mixture}}
        )
    )
    started = time.process_time()
    stream = RunStream(tmp_path / "run")
    uses = stream.list_uses(stream.find_sample("a042x"))
    there = [
        any(use.sample.key == "a042x" for use in stream.list_samples(use.step))
        for use in uses[::250]
    ]
    assert time.process_time() - started < 10
    assert len(uses) == 2500 and all(there)
    assert [use.epoch for use in uses] == list(range(2500))


def test_it_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import onellm_dist.train.sample_log.command, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_an_id_in_full_is_left_out_although_its_dataset_cannot_be_opened(
    run: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run[0], copied)
    path = copied / "samples" / "datasets.json"
    gone = {name: str(tmp_path / "gone" / name) for name in SIZES}
    path.write_text(json.dumps(gone), encoding="utf-8")
    assert exclude_command(copied, ["c/train-000000/c001x@2"]) == 0
    assert (copied / "exclude.txt").read_text() == "c/train-000000/c001x\n"
    for key in ("c001x", "c/train-000000", "typo/train-000000/c001x"):
        with pytest.raises(UsageError, match="gone"):
            exclude_command(copied, [key])
    path.write_text(json.dumps(json.loads((run[0] / "samples/datasets.json").read_text())))
    with pytest.raises(UsageError, match="no sample"):
        exclude_command(copied, ["c/train-000000/c999x"])
