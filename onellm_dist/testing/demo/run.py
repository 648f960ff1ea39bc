"""`onellm demo`: the whole path on the toy world, through the public commands, with a kill and a resume on the way."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError
from onellm_dist.common.progress import seconds_text
from onellm_dist.evaluation.captioning import read_captions
from onellm_dist.evaluation.report import (
    ModalityResult,
    format_table,
    to_json_rows,
)
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.launch.local import exit_by_signal, find_free_port, handle_termination
from onellm_dist.shards.sources.toyworld import world
from onellm_dist.testing.demo.evidence import collect_report, resumed_at
from onellm_dist.testing.demo.journal import Journal, claim
from onellm_dist.testing.demo.processes import Job, run_lanes
from onellm_dist.testing.demo.scale import FULL, QUICK, Scale, Training
from onellm_dist.testing.demo.timetable import Stage, Timetable, measure_speed

RANKS = 2
KILL_AT = 0.45
"""Share of the first run at which its processes are killed; its checkpoints come every tenth."""
NUMBERS, STEPS = r"(\d+)/(\d+)", r"step (\d+)/(\d+)"
"""How commands say how far they are; a training run counts other things, too."""
RUNS = ("align_image", "align_all", "tune")


@dataclass(frozen=True)
class Demo:
    """Where everything of one demo lies, and how it is run."""

    out: Path
    scale: Scale
    ranks: int

    @property
    def toy(self) -> Path:
        """The datasets, a folder a modality."""
        return self.out / "toy"

    @property
    def towers(self) -> Path:
        """The OneLLM directory with pretrained towers."""
        return self.out / "towers"

    def run_dir(self, name: str) -> Path:
        """The run directory of a stage."""
        return self.out / "runs" / name

    def model_before(self, name: str) -> Path:
        """What a stage starts from: the towers, or the stage before."""
        place = RUNS.index(name)
        return self.towers if place == 0 else self.run_dir(RUNS[place - 1]) / "model"

    def log(self, name: str) -> Path:
        """A command's log file."""
        return self.out / "logs" / f"{name}.log"


def run_demo(out: Path, full: bool = False) -> int:
    """Run everything; prints the table, writes `out/report.html`, `out/table.txt` and `out/results.json`.

    Ended on the way, the same command goes on with the stage that it was in; after the end it only shows the table again.

    Returns:
        0; 1 where a modality does not beat its shuffled-input control, or a step failed.

    Raises:
        UsageError: `out` holds something else already, or a demo of the other size.
        OneLLMError: one of the commands failed.
    """
    demo = Demo(out.resolve(), FULL if full else QUICK, ranks=_ranks())
    journal = claim(demo.out, full=full)
    handle_termination(exit_by_signal)  # the commands under way are ended, too
    slow = measure_speed()
    table = Timetable(_stages(demo, slow), journal)
    print(
        f"onellm demo in {demo.out}: {demo.ranks} ranks on {_device()}, this machine runs at {1 / slow:.2f} of the reference's speed"
    )
    table.show()
    stages: list[Callable[[Demo, Timetable, Journal], None]] = [
        _towers_and_shards,
        *(partial(_train, name=name) for name in RUNS),
        _caption,
    ]
    for stage in stages:
        if table.start():
            stage(demo, table, journal)
            table.end()
    results = get_task("toy-captions").score(read_captions(demo.out / "captions.jsonl"))
    if table.start():
        _write_results(demo, results, table)
        table.end()
    print(format_table(results))
    print(f"\nreport: {demo.out / 'report.html'}   all in {seconds_text(table.taken)}")
    return _verdict(results)


def _stages(demo: Demo, slow: float) -> list[Stage]:
    scale = demo.scale
    side = max(scale.clip_seconds, scale.llm_seconds + scale.shards_seconds)
    start_up = 20.0  # a launcher and its ranks: imports, engine, checkpoint
    stages = [Stage("towers and shards", (side + 10) * slow)]
    for name, training in zip(RUNS, scale.stages, strict=True):
        starts = 2 if name == RUNS[0] else 1
        stages.append(
            Stage(
                f"{name.replace('_', ' ')} ({training.steps} steps)",
                (training.steps * training.step_seconds + starts * start_up) * slow,
            )
        )
    stages.append(Stage("captions of test samples", (scale.caption_seconds / 2 + 10) * slow))
    return [*stages, Stage("table and report", 8 * slow)]


def _towers_and_shards(demo: Demo, table: Timetable, _: Journal) -> None:
    """One lane makes the stand-in CLIP, the other the stand-in LLM and then the shards."""
    scale, made = demo.scale, demo.out / "standins"
    for begun in (made, demo.toy, demo.towers):  # by a start that was ended in this stage
        shutil.rmtree(begun, ignore_errors=True)
    counts = ",".join(f"{m}={n}" for m, n in scale.train.items())
    standins = (sys.executable, "-m", "onellm_dist.testing.demo.toy_towers")
    lanes = [
        [_job(demo, "stand-in CLIP", [*standins, "clip", str(made / "clip.pt"), *scale.clip])],
        [
            _job(demo, "stand-in LLM", [*standins, "llm", str(made / "llm.pt"), *scale.llm]),
            _job(
                demo,
                "shards",
                [
                    *_onellm(),
                    "shards",
                    "build",
                    "toyworld",
                    str(demo.toy),
                    "--option",
                    f"train={counts}",
                    "--option",
                    f"test={scale.test}",
                ],
            ),
        ],
    ]
    seconds = {
        "stand-in CLIP": scale.clip_seconds,
        "stand-in LLM": scale.llm_seconds,
        "shards": scale.shards_seconds,
    }
    everything = [job for lane in lanes for job in lane]
    run_lanes(
        lanes,
        lambda running: table.tell(
            _share(everything, running, seconds), " and ".join(job.name for job in running)
        ),
    )
    assemble = _job(
        demo,
        "assemble",
        [*standins, "assemble", str(made / "clip.pt"), str(made / "llm.pt"), str(demo.towers)],
    )
    run_lanes([[assemble]], lambda running: table.tell(0.98, "putting the towers together"))


def _share(jobs: Sequence[Job], running: Sequence[Job], seconds: dict[str, float]) -> float:
    """Share done of jobs side by side, each weighted by its expected time."""
    done = sum(
        seconds[j.name] * (j.progress() if j in running else float(j.process is not None))
        for j in jobs
    )
    return done / sum(seconds.values())


def _train(demo: Demo, table: Timetable, journal: Journal, *, name: str) -> None:
    """One run of the trainer; the first one is killed on the way and resumed."""
    command = _training_command(demo, name, demo.scale.stages[RUNS.index(name)])
    if name == RUNS[0] and not journal.killed:
        victim = _job(demo, name, command, counted=STEPS, kill_at=KILL_AT)
        run_lanes(
            [[victim]], lambda running: table.tell(running[0].progress() if running else KILL_AT)
        )
        if not victim.killed:
            raise OneLLMError(
                f"{name} ended before it could be killed",
                "the resume was not shown.",
                "remove the folder and run the demo again.",
            )
        journal.killed = True
        journal.write()
        print(
            f"\nkilled {name} with SIGKILL at {KILL_AT:.0%}; the same command resumes it",
            file=sys.stderr,
        )
    run_lanes(
        [[_job(demo, name, command, counted=STEPS)]],
        lambda running: table.tell(running[0].progress() if running else 1.0),
    )
    if name == RUNS[0] and not resumed_at(demo.run_dir(name)):
        raise OneLLMError(
            f"{name} did not resume after its kill",
            "it started again at step 0.",
            f"see {demo.log(name)}.",
        )
    if not (demo.run_dir(name) / "model" / "config.json").is_file():
        raise OneLLMError(
            f"{name} left no model", "the next stage starts from it.", f"see {demo.log(name)}."
        )


def _training_command(demo: Demo, name: str, training: Training) -> list[str]:
    return [
        _script("deepspeed"),
        "--num_accelerators",
        str(demo.ranks),
        "--master_port",
        str(find_free_port()),
        "--module",
        "onellm_dist.train",
        training.recipe,
        f"run.dir={demo.run_dir(name)}",
        f"data.root={demo.toy}",
        f"model.path={demo.model_before(name)}",
        f"train.steps={training.steps}",
        *training.overrides,
    ]


def _caption(demo: Demo, table: Timetable, _: Journal) -> None:
    """Caption the test splits, modalities dealt to as many processes as there are ranks."""
    parts = [demo.out / f"captions-{i}.jsonl" for i in range(demo.ranks)]
    order = [*world.MODALITIES]
    dealt = [order[i :: demo.ranks] for i in range(demo.ranks)]
    model = demo.run_dir(RUNS[-1]) / "model"
    lanes = [
        [
            _job(
                demo,
                f"captions {i}",
                [
                    sys.executable,
                    "-m",
                    "onellm_dist.evaluation.captioning",
                    str(model),
                    str(part),
                    *(str(demo.toy / m) for m in mine),
                ],
            )
        ]
        for i, (part, mine) in enumerate(zip(parts, dealt, strict=True))
    ]
    run_lanes(
        lanes, lambda running: table.tell(min((job.progress() for job in running), default=1.0))
    )
    lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: order.index(json.loads(line)["modality"]))
    (demo.out / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_results(demo: Demo, results: Sequence[ModalityResult], table: Timetable) -> None:
    (demo.out / "table.txt").write_text(format_table(results) + "\n", encoding="utf-8")
    (demo.out / "results.json").write_text(
        json.dumps({"seconds": table.taken, "results": to_json_rows(results)}, indent=1),
        encoding="utf-8",
    )
    collect_report(
        demo.out / "report.html",
        results=results,
        captions=read_captions(demo.out / "captions.jsonl"),
        toy=demo.toy,
        runs={name: demo.run_dir(name) for name in RUNS},
        standins=demo.out / "standins",
        timetable=[(s.name, s.predicted, s.taken or 0.0) for s in table.stages],
        device=f"{demo.ranks} ranks on {_device()}",
    )


def _verdict(results: Sequence[ModalityResult]) -> int:
    failed = [
        f"{r.modality} ({split})"
        for r in results
        for split, found in r.splits.items()
        if not found.beats_control
    ]
    if failed:
        print(
            f"not beyond the 95% interval of their own shuffled-input control: {', '.join(failed)}",
            file=sys.stderr,
        )
        return EXIT_FAILED
    return EXIT_DONE


def _ranks() -> int:
    return min(RANKS, torch.cuda.device_count()) if torch.cuda.is_available() else RANKS


def _device() -> str:
    return (
        torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores"
    )


def _job(
    demo: Demo,
    name: str,
    command: Sequence[str],
    *,
    counted: str = NUMBERS,
    kill_at: float | None = None,
) -> Job:
    threads = max(1, (os.cpu_count() or 1) // RANKS)
    return Job(
        name,
        command,
        demo.log(name.replace(" ", "_")),
        {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
        counted,
        kill_at,
    )


def _script(name: str) -> str:
    """A command of this environment.

    Raises:
        OneLLMError: it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise OneLLMError(
            f"no command {name}",
            "the demo trains through it.",
            "install the package with its dependencies: pip install -e .",
        )
    return found


def _onellm() -> list[str]:
    return [_script("onellm")]
