"""`onellm doctor`: what it calls a failure, and that it does not call anything else one."""

from __future__ import annotations

import importlib.metadata
import mmap
import sys
from pathlib import Path

import pytest

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED
from onellm_dist.diagnostics import doctor, machine_checks, software_checks
from onellm_dist.diagnostics.check_result import CheckResult


def test_missing_and_old_packages_fail_and_extras_are_left_out() -> None:
    found = {
        f.name: f
        for f in software_checks.check_packages(
            ["numpy>=1", "numpy>=999", "no-such-package-here>=2", 'absent-extra; extra == "flash"']
        )
        if f.state != "ok"
    }
    assert set(found) == {"numpy", "no-such-package-here"}
    assert all(f.state == "fail" and "pip install" in f.remedy for f in found.values())
    assert ">=999" in found["numpy"].detail


def test_a_torchvision_that_does_not_fit_torch_is_a_failure() -> None:
    def load(name: str) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        if name == "torchaudio":
            raise ModuleNotFoundError("No module named 'torchaudio'", name="torchaudio")
        return object()

    found = {f.name: f for f in software_checks.check_imports(load)}
    assert (
        found["torchvision"].state == "fail"
        and "nms" in found["torchvision"].detail
        and "torch" in found["torchvision"].remedy
    )
    assert "torchaudio" not in found, "a package that is not needed and not there is no finding"
    assert found["open_clip"].state == "ok"


def test_a_broken_torchaudio_is_a_failure() -> None:
    def load(name: str) -> object:
        if name == "torchaudio":
            raise OSError("undefined symbol: _ZN5torch")
        return object()

    found = {f.name: f for f in software_checks.check_imports(load)}
    assert (
        found["torchaudio"].state == "fail" and "uninstall torchaudio" in found["torchaudio"].remedy
    )


def test_a_torchaudio_of_another_torch_is_a_failure_that_names_both() -> None:
    (found,) = software_checks.check_torchaudio(
        lambda name: {"torchaudio": "2.11.0+cu130", "torch": "2.15.0+cu132"}[name]
    )
    assert (
        found.state == "fail"
        and "2.11.0" in found.detail
        and "2.15.0" in found.detail
        and "uninstall" in found.remedy
    )
    assert list(software_checks.check_torchaudio(lambda name: "2.11.0")) == []

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert list(software_checks.check_torchaudio(none)) == []


def test_left_over_buffers_are_counted_and_those_in_use_are_not(tmp_path: Path) -> None:
    for name in (
        "deepspeed_allreduce_buffer_0_root_1",
        "deepspeed_allreduce_buffer_0_root_2",
        "other",
    ):
        (tmp_path / name).write_bytes(b"x" * 8192)
    with (
        (tmp_path / "deepspeed_allreduce_buffer_0_root_2").open("r+b") as file,
        mmap.mmap(file.fileno(), 0),
    ):
        in_use = machine_checks.check_shared_memory(tmp_path)
    assert in_use.state == "warn" and in_use.detail.split("; ")[1].startswith("1 buffer")
    (tmp_path / "deepspeed_allreduce_buffer_0_root_1").unlink()
    (tmp_path / "deepspeed_allreduce_buffer_0_root_2").unlink()
    assert "buffers" not in machine_checks.check_shared_memory(tmp_path).detail


def test_launchers_that_are_missing_fail_but_slurm_and_pdsh_are_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    states = {f.name: f.state for f in software_checks.check_launchers(str(tmp_path))}
    assert states == {"deepspeed": "fail", "torchrun": "fail", "pdsh": "note", "Slurm": "note"}
    for name in ("deepspeed", "torchrun", "srun"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\necho slurm 22.05.8\n")
        script.chmod(0o755)
    found = {f.name: f for f in software_checks.check_launchers(str(tmp_path))}
    assert {f.state for f in found.values()} == {"ok", "note"}
    assert found["Slurm"].detail == "slurm 22.05.8, not inside a job"


def test_the_report_is_plain_when_piped_and_exits_1_on_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = CheckResult("part", "what", "ok", "fine")
    bad = CheckResult("part", "other", "fail", "broken", "fix it")
    monkeypatch.setattr(doctor, "run_checks", lambda: iter([good, bad]))
    assert doctor.run_doctor() == EXIT_FAILED
    out = capsys.readouterr().out
    assert "[fail] part: other: broken\n       -> fix it\n" in out and "\x1b[" not in out
    monkeypatch.setattr(doctor, "run_checks", lambda: iter([good]))
    assert doctor.run_doctor() == EXIT_DONE
    assert "ready to train" in capsys.readouterr().out


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    findings = list(doctor.run_checks())
    names = {f.name for f in findings}
    assert {"torch", "deepspeed", "backend", "CPU", "/dev/shm", "Slurm", "memory"} <= names
    assert not [f for f in findings if f.state == "fail"], (
        "the machine that runs the tests is one that doctor passes"
    )
    doctor.print_results(findings)
    assert len(capsys.readouterr().out.splitlines()) >= len(findings)
