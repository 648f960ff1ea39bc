"""`onellm report`: what it says of runs that went well, were cut short, are still going, or left broken files."""

from __future__ import annotations

import fcntl
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from making_runs import PHASES, MadeRun, eventful

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.report.account import PARTS
from onellm_dist.report.command import facts_of, report_command
from onellm_dist.report.findings import Facts, findings_of
from onellm_dist.report.page import page_of
from onellm_dist.report.summary import summary_json, summary_of, summary_text
from onellm_dist.train.records.metrics import drop_from


def said(facts: Facts) -> str:
    return " | ".join(f.text for f in findings_of(facts))


@pytest.fixture(scope="module")
def four_starts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    run = eventful(tmp_path_factory.mktemp("made") / "run")
    return facts_of(run.directory, now=run.settle())


def test_every_start_is_told_with_its_reason_nodes_and_lost_steps(four_starts: Facts) -> None:
    told = [
        (a.status, a.nodes, a.world, a.first_step, a.last_step, a.lost_steps)
        for a in four_starts.attempts
    ]
    assert told == [
        ("preempted", 2, 16, 0, 330, 0),
        ("lost", 2, 16, 330, 553, 53),
        ("failed", 1, 8, 500, 622, 22),
        ("done", 2, 16, 600, 1000, 0),
    ]
    assert "illegal memory access" in four_starts.attempts[2].reason
    assert four_starts.attempts[2].suspects == ["laion/00031.tar/000310099@0"]
    assert [len(a.steps) for a in four_starts.attempts] == [330, 170, 100, 400], (
        "each step that stands belongs to the start that did it last"
    )


def test_goodput_is_the_time_of_steps_that_counted_over_the_time_held(four_starts: Facts) -> None:
    account, attempts = four_starts.account, four_starts.attempts
    counted = sum(
        line["seconds"] * a.world for a in attempts for line in a.steps if line["applied"]
    )
    assert account.goodput == pytest.approx(counted / account.allocated)
    assert account.allocated == pytest.approx(
        sum(a.seconds * a.world for a in attempts), rel=1e-3
    ), "the parts sum to what was held"
    assert account.parts["lost"] == pytest.approx(53 * 2.0 * 16 + 22 * 2.0 * 8, rel=0.05)
    assert account.parts["skipped"] == pytest.approx(2.0 * 8, rel=0.05)
    assert account.parts["checkpoints"] == pytest.approx(
        (3 * 3 + 4) * 16 + 2 * 3 * 16 + 3 * 8 + 22 * 16 + 4 * 3 * 16, rel=0.2
    )
    assert account.parts["validation"] == pytest.approx(3 * 10 * 16)
    assert set(account.parts) == set(PARTS)


def test_resume_time_has_the_wait_for_nodes_and_every_phase(four_starts: Facts) -> None:
    second = four_starts.attempts[1]
    assert second.phases["scheduler"] == pytest.approx(900, abs=1)
    assert second.phases["job"] == pytest.approx(5, abs=1.5)
    assert second.phases["imports"] == PHASES["imports"] and second.phases[
        "first_step"
    ] == pytest.approx(2, rel=0.1)
    assert "scheduler" not in four_starts.attempts[0].phases
    assert summary_of(four_starts).resume_seconds == pytest.approx(349, abs=3)


def test_troubles_are_found_and_told_in_words(four_starts: Facts) -> None:
    troubles = four_starts.troubles
    assert [s.step for s in troubles.slow] == [370, 371, 372] and troubles.slow[0].waited == 0.9
    assert [e["step"] for e in troubles.skipped] == [560]
    assert len(troubles.skipped_samples) == 1 and troubles.checkpoints[0]["seconds"] == 22.0
    text = said(four_starts)
    for words in (
        "Goodput is",
        "75 steps were done in vain",
        "1 step was skipped: a loss that is not finite (the last: step 560)",
        "could not be read",
        "One checkpoint took 22 s",
        "8, 16",
    ):
        assert words in text, words


def test_the_page_holds_all_it_shows_and_needs_no_network(four_starts: Facts) -> None:
    page = page_of(four_starts, summary_of(four_starts), findings_of(four_starts))
    assert (
        "http" not in page.replace("http://www.w3.org/2000/svg", "")
        and "<script" not in page
        and "@import" not in page
    )
    for heading in (
        "What to look at first",
        "The run on a clock",
        "Loss",
        "Where the time went",
        "Starts",
        "Resume time by phase",
        "Stalls",
    ):
        assert f"<h2>{heading}" in page
    assert page.count("<svg") >= 9 and "Goodput is the share of the allocated time" in page
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", page.lower()), "no NaN reaches a drawing"
    assert page.count("<table") == page.count("</table>") and page.count("<svg") == page.count(
        "</svg>"
    )


def test_a_run_that_is_going_is_known_by_its_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = MadeRun(tmp_path / "run", slurm=False)
    run.begin()
    run.start(0)
    run.train(30)
    now = run.settle()
    with (run.directory / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        facts = facts_of(run.directory, now=now + 5)
        assert facts.attempts[-1].status == "running" and facts.attempts[-1].end == now + 5
        assert summary_of(facts).eta_seconds == pytest.approx(170 * 2.0, rel=0.05)
        assert "may hang" not in said(facts)
        assert "may hang" in said(facts_of(run.directory, now=now + 3600)), (
            "held, but silent for an hour"
        )
        assert report_command(run.directory, None, as_json=False) == EXIT_DONE
    facts = facts_of(run.directory, now=now + 5)
    assert facts.attempts[-1].status == "lost" and facts.attempts[-1].end == pytest.approx(
        now, abs=1
    )
    assert "without a word" in said(facts)
    assert (run.directory / "report.html").is_file()
    assert "30/200" in capsys.readouterr().out


def test_files_that_a_kill_or_a_sick_disk_broke_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    run = eventful(tmp_path / "run")
    whole = facts_of(run.directory, now=run.clock)
    with (run.directory / "metrics.jsonl").open("ab") as out:
        out.write(b'{"step": 1000, "loss": 1.')
    with (run.directory / "events.jsonl").open("ab") as out:
        out.write(b'\x00\x00\xff\xfe\n[1, 2]\n{"event"')
    (run.directory / "attempts.jsonl").write_text("half a li")
    (run.directory / "exit.json").write_text("{")
    (run.directory / "config.yaml").write_text("a: [")
    facts = facts_of(run.directory, now=run.clock)
    assert len(facts.files.steps) == len(whole.files.steps)
    assert facts.files.broken_lines == {"metrics.jsonl": 1, "events.jsonl": 3, "attempts.jsonl": 1}
    assert [a.lost_steps for a in facts.attempts] == [0, 53, 22, 0], (
        "the events alone tell the starts"
    )
    assert "cannot be read" in said(facts)
    assert "<h2>Starts" in page_of(facts, summary_of(facts), findings_of(facts))


VALUES = (
    None,
    "x",
    -1,
    1e300,
    [],
    {},
    [1, {"a": 2}],
    True,
    "2026-11-20T09:14:15+0000",
    0,
    float("nan"),
    "123",
    1.5,
)


@pytest.mark.parametrize("seed", range(2))
def test_no_line_whatever_it_holds_keeps_the_page_from_being_written(
    seed: int, tmp_path: Path
) -> None:
    run = eventful(tmp_path / "run")
    draw = random.Random(seed)
    texts = {path: path.read_text() for path in run.directory.rglob("*.json*") if path.is_file()}
    for _ in range(8):
        for path, text in texts.items():
            lines = text.splitlines()
            for i in draw.sample(range(len(lines)), min(4, len(lines))):
                entry = json.loads(lines[i])
                entry[draw.choice(list(entry))] = draw.choice(VALUES)
                entry.pop(draw.choice(list(entry)))
                lines[i] = json.dumps(entry)
            path.write_text("\n".join(lines) + "\n")
        facts = facts_of(run.directory, now=run.clock)
        summary, findings = summary_of(facts), findings_of(facts)
        assert "</html>" in page_of(facts, summary, findings) and summary_text(
            facts, summary, findings
        )
        json.dumps(summary_json(facts, summary, findings))


@pytest.mark.parametrize(
    "files",
    [["metrics.jsonl"], ["events.jsonl"], ["config.yaml"], ["attempts.jsonl"], ["exit.json"]],
    ids=lambda f: f[0],
)
def test_one_file_alone_is_enough_for_a_page(files: list[str], tmp_path: Path) -> None:
    run = eventful(tmp_path / "run")
    for path in run.directory.iterdir():
        if path.is_file() and path.name not in files:
            path.unlink()
    facts = facts_of(run.directory, now=run.clock)
    summary = summary_of(facts)
    assert "What to look at first" in page_of(facts, summary, findings_of(facts))
    json.dumps(summary_json(facts, summary, findings_of(facts)), allow_nan=False)
    assert summary_text(facts, summary, findings_of(facts))


@pytest.mark.parametrize(
    ("told", "ranks"), [({"ranks": 4}, 4), ({}, 16)], ids=["ranks-told", "older-script"]
)
def test_a_run_of_one_step_and_a_start_that_never_trained(
    tmp_path: Path, told: dict[str, int], ranks: int
) -> None:
    run = MadeRun(tmp_path / "run", steps=1)
    run.begin()
    run.attempt |= told
    run.end("usage", "no dataset at /nowhere")
    (run.directory / "events.jsonl").unlink()  # it failed before there was a record of events
    run.begin(queue=10)
    run.start(0)
    run.train(1)
    run.end("done", "1 steps")
    facts = facts_of(run.directory, now=run.settle())
    assert [(a.status, a.first_step, a.world) for a in facts.attempts] == [
        ("usage", None, ranks),
        ("done", 0, 16),
    ]
    assert facts.account.parts["start_up"] > 0 and 0 < (facts.account.goodput or 0) < 1
    page_of(facts, summary_of(facts), findings_of(facts))


def test_older_runs_without_phases_or_lost_steps_are_told_as_far_as_known(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", slurm=False)
    run.begin()
    run.start(0, told=False)
    run.train(70)
    run.begin(queue=40)
    run.start(50, told=False)
    run.train(150)
    run.end("done", "200 steps")
    facts = facts_of(run.directory, now=run.settle())
    assert [(a.status, a.first_step, a.last_step) for a in facts.attempts] == [
        ("lost", 0, 50),
        ("done", 50, 200),
    ]
    assert facts.account.estimated and not facts.attempts[1].phases
    assert "recorded no phases" in page_of(facts, summary_of(facts), findings_of(facts))


def test_the_same_failure_twice_is_a_crash_loop_and_a_node_in_every_break_is_named(
    tmp_path: Path,
) -> None:
    run = MadeRun(tmp_path / "run")
    run.begin(nodes=("gpu01", "gpu02"))
    run.start(0)
    run.train(60)
    run.end("preempted", "TERM")
    for nodes in (("gpu02", "gpu07"), ("gpu03", "gpu07")):
        run.begin(nodes=nodes, queue=60)
        run.start(60)
        run.train(5)
        run.end(
            "failed",
            "RuntimeError: boom",
            failed_step=65,
            offending_samples=["a/1@0", f"a/{nodes[0]}@0"],
        )
    facts = facts_of(run.directory, now=run.settle())
    text = said(facts)
    assert "2 starts failed at step 65" in text and "suspected each time: a/1@0" in text
    assert "--exclude=gpu07" in text and "gpu02" not in text.split("took part")[0].split("|")[-1]


def test_steps_done_again_inside_a_start_are_in_vain(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    run.begin()
    run.start(0)
    run.train(60)
    run.event("rollback", step=60, to=50, reason="loss spike")
    run.step = 50
    run.train(150)
    run.end("done", "200 steps")
    facts = facts_of(run.directory, now=run.settle())
    assert facts.attempts[0].lost_steps == 10 and len(facts.files.steps) == 200
    assert [e["event"] for e in facts.troubles.others] == ["rollback"]
    assert "rollback" in page_of(facts, summary_of(facts), findings_of(facts))


def test_skipped_steps_are_told_by_kind_with_the_modality_that_each_of_them_had(
    tmp_path: Path,
) -> None:
    run = MadeRun(tmp_path / "run")
    run.begin()
    run.start(0)
    for kind, modalities in (
        ("gradient_spike", ("imu", "image")),
        ("loss_spike", ("imu",)),
        ("gradient_spike", ("imu", "fmri")),
    ):
        run.train(20)
        run.one(grad_norm=900.0, applied=False, loss=2.0)
        run.event(
            "step_skipped",
            step=run.step - 1,
            kind=kind,
            samples=[{"sample": f"{m}/0@0", "modality": m} for m in modalities],
        )
    run.end("done", "63 steps")
    text = said(facts_of(run.directory, now=run.settle()))
    assert (
        "3 steps were skipped: a leap of the gradient norm (2), a leap of the loss (1), each time with suspects of imu (the last: step 62)"
        in text
    )


def test_the_time_that_a_hang_holds_its_nodes_is_told_apart(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    run.begin()
    run.start(0)
    run.train(50)
    run.clock += 900
    run.end("failed", "hang: no progress for 900 s in step 50", failed_step=50)
    facts = facts_of(run.directory, now=run.settle())
    assert (
        facts.account.parts["dead"] == pytest.approx(902 * 16, rel=0.01)
        and facts.account.parts["other"] == 0
    )
    assert "held by a broken start" in said(facts)


def test_a_rollback_whose_lines_are_gone_is_counted_by_its_event_and_a_hang_names_the_host(
    tmp_path: Path,
) -> None:
    run = MadeRun(tmp_path / "run")
    run.begin()
    run.start(0)
    run.train(70, every=1000)
    drop_from(run.directory / "metrics.jsonl", 50)
    run.step = 50
    run.event("rollback", step=69, to=50, lost_steps=20, reason="loss 9.1", kind="spike")
    run.train(10, every=1000)
    run.event("checkpoint", step=60, folder="step-00000060", seconds=30.0, stall_seconds=0.5)
    run.end(
        "failed",
        "hang: no progress for 900 s in step 60",
        failed_step=60,
        kind="hang",
        suspected_host="gpu02",
    )
    facts = facts_of(run.directory, now=run.settle())
    (attempt,) = facts.attempts
    assert (
        attempt.lost_steps == 20
        and attempt.lost_seconds == pytest.approx(40, rel=0.05)
        and not attempt.lost_known
    )
    assert facts.account.parts["checkpoints"] == 0.5 * 16, (
        "what is written in the background stops nobody"
    )
    assert "blamed a rank on gpu02" in said(facts)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data_wait_fraction": 0.4}, "waiting for data"),
        ({"padding_fraction": 0.3}, "padding"),
        ({"grad_norm": 9.0}, "clipped"),
        ({"mfu": 0.05}, "MFU is 5%"),
        ({"router_load": {"image": [0.5, 0.495, 0.005]}}, "expert 3 for image"),
    ],
    ids=["data", "padding", "clip", "mfu", "router"],
)
def test_findings_of_a_slow_or_sick_run(
    fields: dict[str, object], words: str, tmp_path: Path
) -> None:
    run = MadeRun(tmp_path / "run")
    run.begin()
    run.start(0)
    run.train(200, **fields)
    run.end("done", "200 steps")
    assert words in said(facts_of(run.directory, now=run.settle()))


def test_a_healthy_run_has_nothing_that_stands_out(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", steps=2000, every=500)
    run.begin()
    run.start(0)
    run.train(2000, every=500)
    run.end("done", "2000 steps")
    facts = facts_of(run.directory, now=run.settle())
    assert said(facts) == "Nothing stands out."
    assert facts.account.goodput is not None and facts.account.goodput > 0.95


def test_saves_that_do_not_fit_into_the_notice_are_told(four_starts: Facts) -> None:
    late = replace(four_starts, troubles=replace(four_starts.troubles, grace_period=10.0))
    assert "took longer than the job's grace period of 10 s" in said(late).replace("\n", " ")
    assert "longer than the 100 s" not in said(
        replace(four_starts, troubles=replace(four_starts.troubles, grace_period=100.0))
    )


def test_the_faults_of_the_last_preflight_are_repeated(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    run.begin()
    faults = [
        {"state": "fail", "node": "gpu02", "what": "its clock is 40 s ahead", "do": ""},
        {"state": "warn", "node": "", "what": "x"},
    ]
    (run.directory / "preflight.json").write_text(json.dumps({"ok": False, "faults": faults}))
    assert "The last preflight found 1 fault: gpu02: its clock is 40 s ahead." in said(
        facts_of(run.directory, now=run.clock)
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run directory"):
        report_command(tmp_path, None, as_json=False)


def test_json_is_for_scripts_and_writes_no_page(
    four_starts: Facts, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (four_starts.files.directory / "report.html").unlink(missing_ok=True)
    assert report_command(four_starts.files.directory, None, as_json=True) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert found["starts"] == 4 and found["lost_steps"] == 75 and len(found["attempts"]) == 4
    assert not (four_starts.files.directory / "report.html").exists()
    assert (
        report_command(four_starts.files.directory, tmp_path / "sub" / "r.html", as_json=True)
        == EXIT_DONE
    )
    assert (tmp_path / "sub" / "r.html").is_file()
