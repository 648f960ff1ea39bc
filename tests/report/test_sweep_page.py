"""The page that compares the runs of a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from recorded_runs import RecordedRun

from onellm_dist.common import run_files
from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.report.command import COMPARISON, run_report
from onellm_dist.train.records.old_runs import RENAMED_FILES

OLD_FOLDER = next(iter(RENAMED_FILES))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three runs of two rates and seeds; the last has not begun to train."""
    for number, (lr, losses) in enumerate(((1e-5, (2.5, 2.4)), (2e-5, (2.1, 2.2)), (3e-5, ()))):
        run = RecordedRun(tmp_path / f"optim.lr={lr:g}<b>", steps=40)
        config = yaml.safe_load((run.directory / run_files.CONFIG).read_text())
        config["optim"]["lr"], config["run"]["seed"] = lr, number
        (run.directory / run_files.CONFIG).write_text(yaml.safe_dump(config))
        run.allocate()
        if losses:
            run.start(0)
            run.train(20)
        lines = [{"steps_done": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.directory / run_files.VALIDATION).write_text(text)
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_the_best_run_comes_first_with_what_differs(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_report(sweep, None, as_json=False) == EXIT_DONE
    header, first, second, third, _ = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "optim.lr", "run.seed"]
    assert "2.0e-05" in first and "2.1000" in first and "20 of 40" in first
    assert "1.0e-05" in second and "2.4000" in second
    assert "3.0e-05" in third and "–" in third
    page = (sweep / COMPARISON).read_text()
    assert page.count("<svg") == 2 and "optim.lr=1e-05&lt;b&gt;" in page and "<b>" not in page
    assert "notes" not in page


def test_the_same_as_json(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_report(sweep, None, as_json=True) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert found["differences"] == ["optim.lr", "run.seed"]
    assert [run["settings"]["optim.lr"] for run in found["runs"]] == [2e-5, 1e-5, 3e-5]
    assert [run["validation_loss"] for run in found["runs"]] == [2.1, 2.4, None]
    assert not (sweep / COMPARISON).exists()


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run_report(tmp_path, None, as_json=False)


def test_runs_of_0_1_0_are_left_out_of_a_comparison(
    sweep: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    run_report(sweep, None, as_json=True)
    alone = tmp_path_factory.mktemp("alone")
    for folder in (sweep, alone):
        (folder / "earlier" / OLD_FOLDER).mkdir(parents=True)
        (folder / "earlier" / run_files.METRICS).write_text("")
        (folder / "earlier" / run_files.CONFIG).write_text("{}")
    assert run_report(sweep, None, as_json=False) == EXIT_DONE
    assert "earlier is left out: it is a run of onellm_dist 0.1.0" in caplog.text
    page = (sweep / COMPARISON).read_text()
    assert "earlier" not in page and "2.0e-05" in page
    with pytest.raises(UsageError, match=f"{OLD_FOLDER} is called samples/ now"):
        run_report(alone, None, as_json=False)
