"""The integration run: what it checks, what it measures, what it leaves alone."""

from __future__ import annotations

import copy
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from onellm_dist.common.errors import EXIT_FAILED, OneLLMError, UsageError
from onellm_dist.common.logging import configure_logging
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.model.presets import build_config
from onellm_dist.testing.integration import phases
from onellm_dist.testing.integration.estimate import compute_step_flops
from onellm_dist.testing.integration.integration_run import IntegrationRun, start_group
from onellm_dist.testing.integration.memory import PeakMemory, measure_tree
from onellm_dist.testing.integration.report import check_facts, format_report
from onellm_dist.testing.integration.run import REPORT, run_integration
from onellm_dist.testing.integration.weights import compute_changed_shares, open_tensors

MIB = 1 << 20
NAMES = list(all_modalities())


def make_good_facts() -> dict[str, Any]:
    """The facts of a run that passes."""
    steps = [
        {"step": n, "loss": 5.0, "grad_norm": 1.0, "loss_by_modality": dict.fromkeys(NAMES, 5.0)}
        for n in range(3)
    ]
    unchanged = dict.fromkeys(("encoder", "llm", "projectors", "tokenizers", "upm"), 0.0)
    return {
        "media": {name: ["a", "b"] for name in NAMES},
        "phases": [{"phase": "align", "seconds": 61.0, "peak_gib": 9.0}],
        "align": steps,
        "tune": copy.deepcopy(steps),
        "weights_changed": {
            "align": {**unchanged, "projectors": 1.0, "tokenizers": 0.9, "upm": 1.0},
            "tune": {**unchanged, "llm": 1.0},
        },
        "generate": [
            {"model": "tune", "inputs": [f"{n} a"], "prompt": "", "text": "x"} for n in NAMES
        ]
        + [{"model": "tune", "inputs": ["video a", "audio a"], "prompt": "", "text": "x"}],
        "evaluation": {
            "tasks": {name: {"questions": 2, "answered": 2} for name in ("mme", "nsd")},
            "results": {"mme": {"perception,none": 75.0}, "nsd": {}},
            "intervals": {"mme": {"perception": [25.0, 125.0]}},
            "not_computed": {"nsd": {"scores": "there is no Java"}},
            "compared": ["mme  not clear"],
            "overlap": {"expected": {"mme": 6}, "found": {"mme": 6}, "without": ["mme  3 left"]},
        },
        "seconds": 100.0,
        "peak_gib": 12.0,
        "limit_gib": 20.0,
    }


def list_failures(facts: dict[str, Any]) -> list[str]:
    return [name for name, held in check_facts(facts, steps=3).items() if not held]


def test_a_good_run_passes_every_check() -> None:
    assert list_failures(make_good_facts()) == []


@pytest.mark.parametrize(
    ("break_facts", "word"),
    [
        (lambda f: f.update(peak_gib=20.1), "GiB"),
        (lambda f: f.update(error="align ended with exit code 1"), "no phase failed"),
        (lambda f: f["media"].update({NAMES[3]: ["a"]}), "real samples"),
        (lambda f: f["align"].pop(), "align: 3 optimizer steps"),
        (lambda f: f["tune"][1].update(loss=None), "tune: 3 optimizer steps"),
        (lambda f: f["align"][2].update(grad_norm=None), "align: 3 optimizer steps"),
        (
            lambda f: [s["loss_by_modality"].pop(NAMES[5]) for s in f["tune"]],
            "tune: trained on every modality",
        ),
        (lambda f: f["weights_changed"]["align"].update(llm=0.01), "align: everything else"),
        (lambda f: f["weights_changed"]["tune"].update(llm=0.0), "tune: llm changed"),
        (lambda f: f["generate"].pop(), "generate"),
        (lambda f: f["generate"].pop(0), "generate"),
        (lambda f: f["evaluation"]["tasks"]["mme"].update(answered=1), "onellm evaluate"),
        (lambda f: f["evaluation"]["overlap"].update(found={"mme": 6, "nsd": 1}), "overlap"),
    ],
)
def test_each_fault_is_found(break_facts: Any, word: str) -> None:
    facts = make_good_facts()
    break_facts(facts)
    assert [name for name in list_failures(facts) if word in name]


def test_the_report_shows_phases_losses_answers_and_checks() -> None:
    facts = make_good_facts()
    facts["checks"] = check_facts(facts, steps=3)
    facts["ok"] = False
    report = format_report(facts)
    for words in (
        "1 min 01 s",
        "12.0 GiB",
        "grad norm",
        "5.000",
        "video a + audio a",
        "yes at most 20 GiB",
        "FAILED",
        "25.0 to 125.0",
        "there is no Java",
        "mme  not clear",
        "without the 6 questions",
        "mme  3 left",
    ):
        assert words in report


def test_a_run_that_fails_says_so_and_writes_its_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: IntegrationRun) -> None:
        run.run_command("broken", [sys.executable, "-c", "print('half'); raise SystemExit(3)"])

    configure_logging()
    monkeypatch.setattr(phases, "fetch_media", fail)
    assert run_integration(tmp_path / "out") == EXIT_FAILED
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert (
        not report["ok"]
        and "exit code 3" in report["error"]
        and report["phases"][0]["phase"] == "media"
    )
    assert (tmp_path / "out" / "logs" / "broken.log").read_text() == "half\n"
    assert "broken ended with exit code 3" in capsys.readouterr().err


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="something else"):
        run_integration(tmp_path)
    assert (tmp_path / "media" / "holiday.jpg").is_file()


def test_a_failed_command_shows_its_last_lines(tmp_path: Path) -> None:
    code = "import sys\nfor n in range(100): print('line', n)\nsys.exit(7)"
    with PeakMemory(every=60) as memory:
        run = IntegrationRun(tmp_path, 3, 2, 8, "toy", memory)
        with pytest.raises(OneLLMError, match="line 99"):
            run.run_command("noisy", [sys.executable, "-c", code])


def test_leaving_early_ends_what_the_command_started() -> None:
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = (
        f"import subprocess, sys; p = subprocess.Popen({child}); print(p.pid, flush=True); p.wait()"
    )
    found: list[psutil.Process] = []

    def leave_early() -> None:
        with start_group([sys.executable, "-c", code], dict(os.environ)) as process:
            assert process.stdout is not None
            found.append(psutil.Process(int(process.stdout.readline())))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave_early()
    gone, alive = psutil.wait_procs(found, timeout=5)
    assert gone and not alive


def test_peak_memory_counts_children() -> None:
    child = (
        "import mmap, time; m = mmap.mmap(-1, 64 << 20); m.write(b'x' * (64 << 20));"
        "print('up', flush=True); time.sleep(60)"
    )
    with PeakMemory(every=0.05) as memory:
        before = measure_tree(memory.root)
        with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"up\n"
            began = time.monotonic()
            until = began + 30
            while not memory.get_peak(began) and time.monotonic() < until:
                time.sleep(0.01)
            process.kill()
        assert memory.get_peak(began) - before > 60 * MIB


def test_pages_that_two_processes_share_count_once() -> None:
    shared = mmap.mmap(-1, 64 * MIB)
    shared.write(b"x" * (64 * MIB))
    alone = measure_tree(psutil.Process())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # no Python clean-up here: this is a copy of the test process
        sum(shared[:: mmap.PAGESIZE])
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reader, 1) == b"!"
        assert measure_tree(psutil.Process()) - alone < 32 * MIB
        assert psutil.Process(child).memory_info().rss > 64 * MIB, (
            "its resident size would have counted twice"
        )
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_flops_of_an_image_step_are_those_of_its_matrix_products() -> None:
    config = build_config("onellm-7b")
    image = next(
        name for name in NAMES if get_modality(name).visual and get_modality(name).frames == 1
    )
    tokens, llm = 257, 56
    encoder = 24 * tokens * (2 * 12 * 1024**2 + 4 * 257 * 1024)
    expert = 8 * (4 * 1024**2 + 3 * 1024 * 2816)
    upm = 287 * 3 * (2 * expert + 8 * 4 * 287 * 1024)
    head = 2 * 32000 * 4096
    text = llm * (2 * (6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096) + head)
    assert compute_step_flops(config, {image: 1}, tune=False) == pytest.approx(
        encoder + 3 * upm + 2 * text, rel=1e-3
    )
    assert compute_step_flops(config, {image: 2}, tune=True) == pytest.approx(
        2 * (encoder + upm + 3 * text), rel=1e-3
    )


def test_changed_shares_see_single_elements_and_rounding(tmp_path: Path) -> None:
    start = {"llm.a": torch.rand(4, 4), "llm.b": torch.rand(4), "upm.a": torch.rand(3)}
    after = {name: tensor.to(torch.bfloat16) for name, tensor in start.items()}
    after["llm.b"] = after["llm.b"].clone()
    after["llm.b"][2] += 1
    for name, tensors in (("before", start), ("after", after)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    before, now = open_tensors(tmp_path / "before"), open_tensors(tmp_path / "after")
    assert compute_changed_shares(before, now) == {"llm": 0.5, "upm": 0.0}
    del now["upm.a"]
    with pytest.raises(ValueError, match=r"upm\.a"):
        compute_changed_shares(before, now)
