"""`onellm plan --calibrate`, and what uses its constants: `--here`, energy, launch, reports."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from plain_counts import write_recipe
from recorded_runs import RecordedRun
from small_memory import write_constants
from typer.testing import CliRunner

from onellm_dist.cli import app
from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.resources import name_processors
from onellm_dist.data.packing import TokenBudget
from onellm_dist.data.token_budget import read_budget
from onellm_dist.planner import measure
from onellm_dist.planner.brief import describe_briefly
from onellm_dist.planner.budgets import find_budget
from onellm_dist.planner.calibrate import (
    ask_board,
    find_data_sheet,
    format_kind,
    measure_own_memory,
    run_calibration,
)
from onellm_dist.planner.command import (
    PlanOptions,
    load_planned_config,
    make_cluster,
    make_config_planner,
    make_planner,
)
from onellm_dist.planner.hardware import find_gpus_here, find_kind, get_gpu_kind
from onellm_dist.planner.job_check import check_job_plan
from onellm_dist.planner.measure import DeviceMeter, MeasuredSizes
from onellm_dist.planner.run_plan import Planner
from onellm_dist.planner.show import make_energy_rows
from onellm_dist.report.command import run_report
from onellm_dist.report.facts import load_facts
from onellm_dist.report.prediction import (
    Prediction,
    build_prediction,
    draw_prediction,
    make_prediction_rows,
)

HERE = PlanOptions(here=True, gpus_per_node=2)
AUTO = ["data.pack_llm_tokens=auto", "data.pack_encoder_tokens=auto"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache without constants, on a machine without a GPU."""
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path / "cache"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.mark.slow
def test_processors_are_measured_and_planned_for(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="onellm plan --calibrate"):
        find_gpus_here()
    monkeypatch.setattr(measure, "CPU_SIZES", MeasuredSizes(256, 256, 2, 1, 1 << 22))
    assert run_calibration(seconds=0.02) == EXIT_DONE
    said = capsys.readouterr().out
    assert name_processors() in said and "matmul_share" in said and "written: " in said
    kind, count = find_gpus_here()
    assert (count, kind.shared) == (1, True)
    # Named as the processors are: a home directory may be that of many machines.
    assert kind.kind == "-".join(re.findall("[a-z0-9]+", name_processors().lower()))
    assert kind == get_gpu_kind(kind.kind) == find_kind(name_processors())
    assert [path.stem for path in (cache / "calibration").iterdir()] == [kind.kind]
    assert {"peak_tflops", "attention_share", "bandwidth_gb_s", "host", "memory_gb"} <= set(
        kind.measured
    )
    # The numbers are rates of this machine: none is of a GPU, none is nothing.
    assert 1e-4 < kind.peak_tflops["fp32"] < 100 and 0.1 < kind.bandwidth_gb_s < 2000
    assert kind.matmul_share == 1 and kind.launch_us == 0 and kind.board_watts is None
    assert kind.host is not None and 0.1 < kind.host.call_us < 1000
    cluster = make_cluster(HERE)
    assert cluster.world_size == 2 and cluster.gpu.measured == kind.measured
    assert cluster.gpu.memory_gb == kind.memory_gb / 2  # the ranks share the machine
    assert cluster.gpu.peak_tflops["fp32"] == kind.peak_tflops["fp32"] / 2
    # Measured again, the sources stay as many as they were.
    assert run_calibration(seconds=0.01) == EXIT_DONE
    assert "(before: " in capsys.readouterr().out
    assert len(get_gpu_kind(kind.kind).sources) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path))
    assert run_calibration(seconds=0.2) == EXIT_DONE
    kind, count = find_gpus_here()
    assert count == torch.cuda.device_count() and not kind.shared
    assert {"matmul_share", "attention_share", "bandwidth_share", "launch_us", "host"} <= set(
        kind.measured
    )
    assert 0.3 < kind.matmul_share <= 1 and 0.3 < kind.bandwidth_share <= 1
    assert 0.05 < kind.attention_share <= 1 and 0.1 < kind.launch_us < 50


def test_an_earlier_calibration_bounds_no_later_one(cache: Path) -> None:
    """Neither peaks that were measured nor a context that other processes made large."""
    cuda, name = torch.device("cuda", 0), "NVIDIA H100 80GB HBM3"
    shipped = find_kind(name)
    assert shipped is not None and find_data_sheet(cuda, shipped) == shipped
    rates = shipped.model_copy(update={"measured": ("matmul_share",), "context_gb": 33.0})
    assert find_data_sheet(cuda, rates) == rates  # its peaks are still those of the data sheet
    (cache / "calibration").mkdir(parents=True)
    (cache / "calibration" / f"{shipped.kind}.yaml").write_text(format_kind(rates, name))
    own = find_kind(name)
    assert own is not None and own.context_gb == 33
    assert find_kind(name, shipped_only=True) == shipped
    peaks = shipped.model_copy(update={"measured": ("peak_tflops", "matmul_share")})
    assert find_data_sheet(cuda, peaks) is None
    assert find_data_sheet(torch.device("cpu"), shipped) is None


def test_memory_of_other_processes_is_not_that_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, gib = torch.device("cuda", 0), 1 << 30
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (50 * gib, 80 * gib))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 9 * gib)
    assert measure_own_memory(device, 20 * gib) == 1 * gib
    assert measure_own_memory(device, 40 * gib) == 0  # another one has ended meanwhile
    # Which GPU it is: number 0 of this process may be another one of the machine.
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="ab-1"))
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho 20480\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert ask_board(device, "memory.used") == 20480
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--id=GPU-ab-1 --query-gpu=memory.used ")
    program.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert ask_board(device, "memory.used") is None


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that always says 0.25 s shows what each measurement takes for its work."""
    meter = DeviceMeter(torch.device("cpu"), seconds=0, sizes=MeasuredSizes(8, 16, 2, 1, 4096))
    ran: list[torch.Tensor] = []

    def take_a_quarter(_: DeviceMeter, run: Any) -> float:
        ran.append(run())
        return 0.25

    monkeypatch.setattr(DeviceMeter, "measure", take_a_quarter)
    fp32 = torch.float32
    assert meter.measure_product(fp32) == 2 * 8 * 16 * 16 / 0.25
    assert meter.measure_product(fp32, 4) == 2 * 8 * 4 * 16 / 0.25
    assert meter.measure_attention(fp32) == 2 * 4 * 256 * 256 * 16 * 64 / 0.25
    assert meter.measure_convolution(fp32) == 2 * 256 * 1024 * 588 / 0.25
    assert meter.measure_bandwidth() == 2 * 4096 / 0.25
    shapes = [tuple(found.shape) for found in ran]
    assert shapes[:4] == [(8, 16), (8, 16), (512, 16, 64), (1, 1024, 16, 16)]


def test_a_damaged_file_of_the_user_is_named(cache: Path) -> None:
    write_constants(cache)
    path = cache / "calibration" / "cpu.yaml"
    path.write_text(path.read_text().replace("memory_gb: 500.0", "memory_gb: a lot"))
    with pytest.raises(UsageError, match=r"cpu\.yaml: not a calibration file"):
        get_gpu_kind("h100")


@pytest.mark.slow
def test_budgets_are_found_for_a_device(
    cache: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_constants(cache)
    planner = make_planner(recipe, AUTO, HERE)
    large, need = read_budget(planner.config.data), planner.compute_memory(planner.config)
    assert need.fits and planner.get_step(planner.config).micro_batches == 1
    monkeypatch.setattr("onellm_dist.planner.brief.make_planner", lambda *_: planner)
    said = describe_briefly(recipe, AUTO)
    assert any(f"token budgets of {large.llm} and {large.encoder}" in line for line in said)
    # With less memory the budgets are smaller, and still hold the largest sample.
    write_constants(cache, memory_gb=2 * 0.6 * need.total / 1e9)
    config = load_planned_config(recipe, AUTO)
    asked: dict[str, Any] = {"nodes": 1, "ranks_per_node": 2, "text_tokens": 17}
    least = TokenBudget(200, 1213)
    small = find_budget(config, device_name=name_processors(), least=least, **asked)
    assert least.llm <= small.llm < large.llm and least.encoder <= small.encoder < large.encoder
    with pytest.raises(UsageError, match="no constants for Abacus"):
        find_budget(config, device_name="Abacus", least=least, **asked)


@pytest.mark.slow
def test_a_job_is_warned_about_before_it_is_queued(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: dict[str, Any] = {"gpu": "h100", "nodes": 1, "gpus_per_node": 2, "limit_s": 3600}
    (unknown,) = check_job_plan(recipe, ["data.mixture=[{path: mine}]"], **job)
    assert unknown.startswith("not planned: data.mixture: no dataset")
    with pytest.raises(UsageError, match="--gpu rtx"):
        check_job_plan(recipe, [], **{**job, "gpu": "rtx"})
    options = PlanOptions(gpu="h100", gpus_per_node=2)
    planner = make_planner(recipe, ["train.steps=1000000"], options)
    monkeypatch.setattr("onellm_dist.planner.job_check.make_planner", lambda *_: planner)
    plan = planner.plan()
    assert plan.hours > 1 and plan.energy_kwh == pytest.approx(plan.gpu_hours * 0.7)
    ((name, energy),) = make_energy_rows(plan, planner.cluster)
    assert name == "energy" and "kWh at most, at 700 W a board (NVIDIA's data sheet" in energy
    planned, warning = check_job_plan(recipe, [], **job)
    assert planned.startswith("planned on 1 x 2 h100-80: ") and "samples/s" in planned
    assert f"warning: the run takes {plan.hours:.1f} h" in warning
    assert len(check_job_plan(recipe, [], **{**job, "limit_s": 0})) == 1
    launch = ["launch", str(recipe), "--gpus-per-node", "2", "--set", f"run.dir={tmp_path / 'run'}"]
    done = CliRunner().invoke(app, [*launch, "--gpu", "h100", "--time", "1:00:00"])
    assert done.exit_code == 0 and f"onellm launch: {warning}" in done.stderr
    assert "warning" not in done.stdout
    assert "not planned: --gpu h100 would" in CliRunner().invoke(app, launch).stderr
    small = planner.cluster.gpu.model_copy(update={"memory_gb": 1.5})
    planner.cluster = replace(planner.cluster, gpu=small)
    _, short, *_ = check_job_plan(recipe, [], **job)
    assert short.startswith("warning: does not fit: ")


@pytest.mark.slow
def test_the_report_shows_predicted_beside_measured(
    cache: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_constants(cache)
    planners: list[Planner] = []

    def keep(*given: Any) -> Planner:
        planners.append(make_config_planner(*given))
        return planners[-1]

    monkeypatch.setattr("onellm_dist.planner.command.make_config_planner", keep)
    run = RecordedRun(tmp_path / "run", slurm=False, step_seconds=2.0)
    run.allocate(nodes=("n1",), ranks_per_node=2)
    run.start(0)
    run.train(20, samples=64, peak_memory_bytes=3e9, mfu=None)
    run.end("done", "20 steps")
    events = run.directory / "events.jsonl"
    named = f'"device_name": {json.dumps(name_processors())}, "device"'
    events.write_text(events.read_text().replace('"device"', named))
    config = load_planned_config(recipe, []).model_dump(mode="json", by_alias=True)
    (run.directory / "config.yaml").write_text(yaml.safe_dump(config))
    found = predict(run)
    plan = planners[0].plan()
    figures = {figure.name: figure for figure in found.figures}
    assert figures["seconds a step"].predicted == plan.time.total
    assert figures["seconds a step"].ratio == pytest.approx(2 / plan.time.total, rel=0.05)
    assert figures["samples/s"].predicted == plan.samples_per_second
    assert figures["samples/s"].measured == pytest.approx(32, rel=0.05)
    assert figures["peak memory of a rank"].measured == 3e9
    assert figures["MFU"].measured is None and figures["MFU"].predicted == plan.mfu
    assert planners[0].cluster.world_size == 2
    monkeypatch.setattr("onellm_dist.report.command.build_prediction", lambda *_: found)
    page = tmp_path / "page.html"
    run_report(run.directory, page, as_json=True)
    said = json.loads(capsys.readouterr().out)["prediction"]
    assert said["figures"][0]["ratio"] == figures["samples/s"].ratio
    assert "<h2>Predicted and measured</h2>" in page.read_text()
    run_report(run.directory, page, as_json=False)
    assert "predicted and measured (2 x " in capsys.readouterr().out
    # A recipe that is not complete, and a device without constants.
    (run.directory / "config.yaml").write_text("run: {seed: 0}")
    assert predict(run).problem == "config.yaml is not a complete recipe"
    (cache / "calibration" / "cpu.yaml").unlink()
    facts = load_facts(run.directory)
    assert build_prediction(facts.records, facts.starts) is None


def predict(run: RecordedRun) -> Prediction:
    """What the report says of a run: the same in JSON, on the page and on the terminal."""
    facts = load_facts(run.directory)
    found = build_prediction(facts.records, facts.starts)
    assert found is not None
    page = "".join(draw_prediction(found))
    assert "<h2>Predicted and measured</h2>" in page and name_processors() in page
    rows = make_prediction_rows(found)
    if found.problem:
        assert found.problem in page and not found.figures
    else:
        assert all(cell in page for row in rows for cell in row)
    figures = json.loads(json.dumps(found.to_json()))["figures"]
    assert [figure["name"] for figure in figures] == [row[0] for row in rows[1:]]
    return found


def test_calibrate_takes_no_recipe_and_a_plan_needs_one() -> None:
    for arguments, words in (
        (["--calibrate", "tune"], "--calibrate measures this machine"),
        ([], "no RECIPE was given"),
    ):
        with pytest.raises(UsageError, match=words):
            CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
