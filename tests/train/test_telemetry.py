"""What a run tells beside its losses: FLOPs, router load, trackers, profiles."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch.utils.flop_counter import FlopCounterMode

from onellm_dist.common.errors import UsageError
from onellm_dist.config.load import load_config
from onellm_dist.config.schema import RunConfig, TrackSection
from onellm_dist.data.micro_batch import BatchTotals
from onellm_dist.modalities import SPAN_TOKENS, all_modalities
from onellm_dist.model.presets import load_model
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.train.callbacks.experts import RouterWatch, Starvation
from onellm_dist.train.callbacks.profiler import Profiler
from onellm_dist.train.callbacks.telemetry import Telemetry, peak_memory
from onellm_dist.train.callbacks.trackers import Trackers, check_trackers, tracker_class
from onellm_dist.train.flops import FlopCounter
from onellm_dist.train.optim.stages import freeze_for_stage
from onellm_dist.train.records.metrics import Events, Metrics, StepReport, scalars

TEXT = 60


class LineTracker(GeneralTracker):
    """Writes what it is told, a JSON object a line, as an offline tracker of a user's own."""

    name = "lines"
    requires_logging_directory = True
    fails_at: ClassVar[int | None] = None

    def __init__(self, project: str, folder: str, tag: str = "") -> None:
        super().__init__()
        self.path = Path(folder) / f"{project}{tag}.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    def _add(self, **line: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def start(self) -> None:
        self._add(call="start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._add(call="config", values=values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route")
        self._add(call="log", step=step, values=values)

    def finish(self) -> None:
        self._add(call="finish")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(step: int, **fields: Any) -> StepReport:
    given = {
        "loss": 2.0,
        "loss_by_modality": {"image": 2.0},
        "lr": 1e-3,
        "grad_norm": 1.0,
        "applied": True,
        "samples": 4,
        "supervised_tokens": 9,
        "tokens": 100,
        "padding_fraction": 0.0,
        "tokens_per_second": 50.0,
        "data_wait_fraction": 0.1,
        "mfu": None,
        "sample_digest": "",
        "seconds": 2.0,
    }
    return StepReport(step=step, **{**given, **fields})


@pytest.fixture
def own_tracker(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(
        sys.modules, "my_trackers", SimpleNamespace(LineTracker=LineTracker, Other=dict)
    )
    monkeypatch.setattr(LineTracker, "fails_at", None)
    return "my_trackers:LineTracker"


def test_trackers_get_the_recipe_and_every_figure(tmp_path: Path, own_tracker: str) -> None:
    track = TrackSection.model_validate(
        {"with": [own_tracker], "project": "p", "options": {own_tracker: {"tag": "-x"}}}
    )
    trackers = Trackers(
        track,
        tmp_path,
        {"train": {"steps": 3, "stage": "align"}, "data": {"mixture": [1, 2]}},
        Events(tmp_path, main=True),
    )
    metrics = Metrics(tmp_path, main=True, first_step=0, steps=2, log_every=1, trackers=trackers)
    part, load = {"image": 0.6, "upm": 0.8}, {"image": [0.2, 0.3, 0.5]}
    metrics.write(
        report(0, grad_norm_by_part=part, router_load=load, peak_memory_bytes=7, pack_balance=1.25)
    )
    metrics.write(report(1, grad_norm=float("nan")))
    metrics.close()
    trackers.finish()
    told = lines(tmp_path / "trackers" / "p-x.jsonl")
    assert [line["call"] for line in told] == ["start", "config", "log", "log", "finish"]
    assert told[1]["values"] == {"train.steps": 3, "train.stage": "align", "data.mixture": "[1, 2]"}
    values = told[2]["values"]
    assert (
        values["train/loss"] == 2.0
        and values["loss_by_modality/image"] == 2.0
        and values["grad_norm_by_part/upm"] == 0.8
    )
    assert (
        values["router_load/image/expert2"] == 0.5
        and values["train/pack_balance"] == 1.25
        and "train/mfu" not in values
    )
    assert told[3]["step"] == 1 and "train/grad_norm" not in told[3]["values"], (
        "what is not finite is left out"
    )
    written = lines(tmp_path / "metrics.jsonl")
    assert scalars(written[0]) == values
    assert written[1]["router_load"] is None


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(
    tmp_path: Path, own_tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LineTracker, "fails_at", 1)
    trackers = Trackers(
        TrackSection.model_validate({"with": [own_tracker]}),
        tmp_path,
        {},
        Events(tmp_path, main=True),
    )
    for step in range(3):
        trackers.log({"loss": 1.0}, step)
    trackers.finish()
    assert [line["call"] for line in lines(tmp_path / "trackers" / "onellm.jsonl")] == [
        "start",
        "config",
        "log",
    ]
    (event,) = lines(tmp_path / "events.jsonl")
    assert (event["event"], event["tracker"], event["call"]) == (
        "tracker_dropped",
        own_tracker,
        "log",
    ) and "no route" in event["problem"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wandbb", "did you mean wandb"),
        ("my_trackers:Nothing", "cannot be imported"),
        ("no_such_module:X", "cannot be imported"),
        ("my_trackers:Other", "is no accelerate.tracking.GeneralTracker"),
    ],
)
def test_trackers_that_do_not_exist_are_refused(own_tracker: str, name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_trackers(TrackSection.model_validate({"with": [name]}))


def test_a_tracker_whose_package_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(UsageError, match="pip install comet-ml"):
        check_trackers(TrackSection.model_validate({"with": ["comet_ml"]}))
    monkeypatch.undo()
    assert tracker_class("tensorboard").name == "tensorboard"


def recipe(tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {preset: toy}\ndata: {mixture: [{path: image}], global_batch: 1}\ntrain: {stage: align, steps: 9}\noptim: {lr: 1.0}\n"
    )
    return load_config(path, overrides)


def test_the_keys_of_tracking_are_read_and_written_back(tmp_path: Path) -> None:
    config = recipe(tmp_path, "track.with=[wandb]", "track.profile_steps=[10,12]")
    assert config.track.trackers == ("wandb",) and config.track.profile_steps == (10, 12)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert "with:" in config.to_yaml()
    assert load_config(resolved) == config
    with pytest.raises(UsageError, match=r"did you mean track\.with"):
        recipe(tmp_path, "track.wiht=[wandb]")


def test_profiles_are_written_where_asked_for(tmp_path: Path) -> None:
    device, events = torch.device("cpu"), Events(tmp_path, main=True)
    profiler = Profiler(TrackSection(profile_steps=(1, 2)), tmp_path, device, events, main=True)
    other = Profiler(TrackSection(profile_steps=(1, 2)), tmp_path, device, events, main=False)
    for step in range(8):
        if step == 4:
            (tmp_path / "profile").touch()
        if step == 6:
            (tmp_path / "profile").write_text("1\n")
        profiler.begin(step)
        other.begin(step)
        torch.ones(64, 64) @ torch.ones(64, 64)
        other.end(step)
        profiler.end(step)
    names = ["steps-00000001-00000002", "steps-00000004-00000005", "steps-00000006-00000006"]
    assert sorted(p.name for p in (tmp_path / "profiles").iterdir()) == [
        f"{name}.trace.json.gz" for name in names
    ]
    assert [(e["first"], e["last"]) for e in lines(tmp_path / "events.jsonl")] == [
        (1, 2),
        (4, 5),
        (6, 6),
    ]
    assert not (tmp_path / "profile").exists()
    trace = json.loads(
        gzip.decompress((tmp_path / "profiles" / f"{names[0]}.trace.json.gz").read_bytes())
    )
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 2


def test_an_expert_starves_where_no_modality_uses_it_for_long() -> None:
    watch = Starvation(0.1, 20)
    busy, starved = (
        {"a": [0.5, 0.05, 0.45], "b": [0.4, 0.2, 0.4]},
        {"a": [0.5, 0.05, 0.45], "b": [0.5, 0.09, 0.41]},
    )
    assert [watch.update(step, busy) for step in range(0, 100, 10)] == [[]] * 10
    assert [watch.update(step, starved) for step in range(100, 140, 10)] == [[], [], [1], []]
    assert watch.update(140, busy) == []
    assert [watch.update(step, starved) for step in range(150, 180, 10)] == [[], [], [1]], (
        "told again after it recovered"
    )


@pytest.fixture(scope="module")
def toy() -> Any:
    model, _ = load_model(path=None, preset="toy", seed=0)
    return model


def pack_of(model: Any, names: list[str], text: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    values = {
        m: torch.randn((names.count(m), *kind.value_shape), generator=generator)
        for m, kind in all_modalities().items()
    }
    ids = torch.randint(3, 400, (text * len(names),), generator=generator)
    labels = ids.clone()
    labels[::text] = IGNORE
    return PackedBatch(
        ids,
        labels,
        (text,) * len(names),
        tuple((name,) for name in names),
        values,
        torch.ones(len(names)),
    )


def test_router_load_is_the_mean_gate_and_starvation_is_an_event(tmp_path: Path, toy: Any) -> None:
    watch = RouterWatch(toy, {"image", "imu"})
    assert watch.read() == {}
    out = toy(packed=pack_of(toy, ["image", "audio"], 5))
    load = watch.read()
    assert set(load) == {"image", "imu"}
    assert load["image"] == pytest.approx(out.router_weights["image"].mean(0).tolist())
    assert sum(load["imu"]) == pytest.approx(1, abs=1e-5)

    dist = SimpleNamespace(gather=lambda value: [value, 3 * value], device=torch.device("cpu"))
    config = recipe(
        tmp_path,
        "train.log_every=2",
        "track.underused_expert_share=0.9",
        "track.underused_expert_steps=4",
    )
    telemetry = Telemetry(config, dist, Events(tmp_path, main=True), watch)  # type: ignore[arg-type]
    telemetry.stalled = 1.5
    first, second = telemetry.read(0), telemetry.read(1)
    assert (first.router_load, first.peak_memory_bytes, first.checkpoint_stall_seconds) == (
        None,
        None,
        1.5,
    )
    assert second.router_load == load and second.checkpoint_stall_seconds == 0
    assert second.peak_memory_bytes is not None and second.peak_memory_bytes >= 3 * (100 << 20)
    for step in range(2, 9):
        telemetry.read(step)
    starved = [
        event for event in lines(tmp_path / "events.jsonl") if event["event"] == "expert_starves"
    ]
    assert [event["expert"] for event in starved] == [0, 1, 2]
    assert set(starved[0]["load"]) == {"image", "imu"}


def test_peak_memory_is_of_this_process() -> None:
    before = peak_memory(torch.device("cpu"))
    torch.zeros(80 << 20).add_(1)  # 320 MiB, touched
    assert (
        peak_memory(torch.device("cpu")) >= before + 0
        and peak_memory(torch.device("cpu")) > 320 << 20
    )


@pytest.mark.parametrize("stage", ["align", "tune"])
@pytest.mark.parametrize("kind", ["image", "imu"])
def test_the_flops_formula_counts_what_is_computed(toy: Any, stage: str, kind: str) -> None:
    """Against torch's own counter of matrix products in forward and backward, less what the formula leaves out by its statement."""
    samples = 2
    batch = pack_of(toy, [kind] * samples, TEXT)
    freeze_for_stage(toy, stage, {kind})
    modality = all_modalities()[kind]
    corpus = SimpleNamespace(spans=[(kind,)], modalities={kind: modality})
    counter = FlopCounter(toy, corpus, stage)  # type: ignore[arg-type]
    totals = BatchTotals(
        samples=samples,
        llm_tokens=samples * (TEXT + SPAN_TOKENS),
        encoder_tokens=samples * modality.encoder_tokens,
        supervised_tokens=samples * (TEXT - 1),
        empty_micro_batches=0,
        samples_by_dataset=(samples,),
        samples_by_combination={(kind,): samples},
    )
    plan = SimpleNamespace(totals=totals, global_valid_tokens=1, balance=1.0)
    said = counter.step(plan).flops  # type: ignore[arg-type]
    with FlopCounterMode(display=False, depth=3) as counted:
        toy(packed=batch).loss.backward()
    toy.zero_grad()
    counts = counted.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "attention" in str(op))
    left_out = _projections_and_tokenizers(toy, kind, samples, stage == "align")
    assert said == pytest.approx(sum(counts.values()) - attention - left_out, rel=0.001)


def _projections_and_tokenizers(model: Any, kind: str, samples: int, trains: bool) -> float:
    """What the formula leaves out: per-modality projections, the routers (of every modality: they run on their queries), tokenizers."""
    width, llm, hidden = (
        model.config.vision.width,
        model.config.text_config.hidden_size,
        model.config.upm.router_hidden,
    )
    modality = all_modalities()[kind]
    queries = modality.upm_tokens - modality.tokens - 1
    inputs = samples * (modality.tokens + 1) * 2 * width * width
    outputs = samples * queries * 2 * width * llm
    routers = queries * 2 * hidden * (width + model.config.upm.experts)
    # image's input projection needs no gradient of its input (the encoder before it is frozen); IMU's passes it on to the tokenizer
    backward = (1 if modality.visual else 2, 2, 2) if trains else (0, 0, 0)
    total = (
        inputs * (1 + backward[0])
        + outputs * (1 + backward[1])
        + routers * (len(model.config.modalities) + backward[2])
    )
    if modality.visual:
        return total + samples * modality.tokens * 2 * width * 3 * model.config.vision.patch_size**2
    return total + samples * modality.tokens * 2 * width * 6 * 10 * (2 if trains else 1)
