"""The stages of the demo: toy towers and shards, training runs, captions."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.extras import get_install_command
from onellm_dist.common.logging import get_logger
from onellm_dist.launch.local import find_free_port
from onellm_dist.launch.slurm.run_progress import find_newest_checkpoint
from onellm_dist.shards.sources.toyworld import world
from onellm_dist.testing.demo.journal import Journal
from onellm_dist.testing.demo.layout import RANKS, RUNS, Demo
from onellm_dist.testing.demo.processes import COUNT, DemoProcess, run_lanes
from onellm_dist.testing.demo.report_data import list_resumes
from onellm_dist.testing.demo.scale import RunScale
from onellm_dist.testing.demo.timetable import Timetable

KILL_AT = 0.45
"""Share of the first run at which its processes are killed; it has a checkpoint every tenth."""
STEP_COUNT = r"(\d+)/(\d+) steps"
"""How a training run prints its progress; it counts other things too."""
ASSEMBLE_SHARE = 0.98
"""Share of its stage that is done when the towers are assembled."""

logger = get_logger(__name__)


def make_towers_and_shards(demo: Demo, table: Timetable, _: Journal) -> None:
    """Pretrain the toy CLIP, and beside it the toy LLM and then build the shards."""
    scale, pretrained = demo.scale, demo.pretrained
    for folder in (pretrained, demo.toy, demo.towers):  # of a start that was interrupted here
        shutil.rmtree(folder, ignore_errors=True)
    clip, llm = str(pretrained / "clip.pt"), str(pretrained / "llm.pt")
    towers = (sys.executable, "-m", "onellm_dist.testing.demo.toy_towers")
    counts = ",".join(f"{modality}={count}" for modality, count in scale.train.items())
    build = [find_command("onellm"), "shards", "build", "toyworld", str(demo.toy)]
    build += ["--option", f"train={counts}", "--option", f"test={scale.test}"]
    lanes = [
        [_make_process(demo, "toy CLIP", [*towers, "clip", clip, *scale.clip])],
        [
            _make_process(demo, "toy LLM", [*towers, "llm", llm, *scale.llm]),
            _make_process(demo, "shards", build),
        ],
    ]
    seconds = {
        "toy CLIP": scale.clip_seconds,
        "toy LLM": scale.llm_seconds,
        "shards": scale.shards_seconds,
    }
    everything = [process for lane in lanes for process in lane]

    def show(running: Sequence[DemoProcess]) -> None:
        share = _compute_share(everything, running, seconds)
        table.show_progress(share, " and ".join(process.name for process in running))

    run_lanes(lanes, show)
    assemble = _make_process(demo, "assemble", [*towers, "assemble", clip, llm, str(demo.towers)])
    run_lanes([[assemble]], lambda _: table.show_progress(ASSEMBLE_SHARE, "assembling the towers"))


def _compute_share(
    processes: Sequence[DemoProcess], running: Sequence[DemoProcess], seconds: dict[str, float]
) -> float:
    """Share that is done of several processes, weighted by their predicted seconds."""
    done = 0.0
    for process in processes:
        started = float(process.process is not None)
        share = process.read_progress() if process in running else started
        done += seconds[process.name] * share
    return done / sum(seconds.values())


def train(demo: Demo, table: Timetable, journal: Journal, *, name: str) -> None:
    """Train one run; the first one is killed midway and resumed.

    Raises:
        OneLLMError: a command failed, the first run did not resume, or there is no model.
    """
    run = demo.scale.runs[RUNS.index(name)]
    command = make_training_command(demo, name, run)
    is_first = name == RUNS[0]

    def find_kept() -> float:
        """A resumed run prints no step for a while; what it resumes is done."""
        return (find_newest_checkpoint(demo.run_dir(name)) or 0) / run.steps

    if is_first and not journal.killed:
        _kill_on_the_way(demo, table, journal, name, command, kept=find_kept())
    process, kept = _make_process(demo, name, command, count_pattern=STEP_COUNT), find_kept()
    run_lanes([[process]], lambda running: _show_training(table, running, 1.0, kept=kept))
    if is_first and not list_resumes(demo.run_dir(name)):
        raise OneLLMError(
            f"{name} did not resume after its kill",
            "it started again at step 0.",
            f"see {demo.log(name)}.",
        )
    if not (demo.model(name) / "config.json").is_file():
        raise OneLLMError(
            f"{name} left no model", "the next stage starts from it.", f"see {demo.log(name)}."
        )


def _kill_on_the_way(
    demo: Demo,
    table: Timetable,
    journal: Journal,
    name: str,
    command: Sequence[str],
    *,
    kept: float,
) -> None:
    process = _make_process(demo, name, command, count_pattern=STEP_COUNT, kill_at=KILL_AT)
    run_lanes([[process]], lambda running: _show_training(table, running, KILL_AT, kept=kept))
    if not process.killed:
        raise OneLLMError(
            f"{name} ended before it could be killed",
            "the resume was not shown.",
            "remove the folder and run the demo again.",
        )
    journal.killed = True
    journal.write()
    logger.info(
        "\nkilled %s by SIGKILL at %.0f%%; the same command resumes it", name, 100 * KILL_AT
    )


def _show_training(
    table: Timetable, running: Sequence[DemoProcess], otherwise: float, *, kept: float
) -> None:
    table.show_progress(max(kept, running[0].read_progress() if running else otherwise))


def make_training_command(demo: Demo, name: str, run: RunScale) -> list[str]:
    """Make the command that trains a run under the deepspeed launcher.

    Args:
        demo: the demo.
        name: name of the run.
        run: its size.
    """
    return [
        find_command("deepspeed"),
        "--num_accelerators",
        str(demo.ranks),
        "--master_port",
        str(find_free_port()),
        "--module",
        "onellm_dist.train",
        run.recipe,
        f"run.dir={demo.run_dir(name)}",
        f"data.root={demo.toy}",
        f"model.path={demo.model_before(name)}",
        f"train.steps={run.steps}",
        *run.overrides,
    ]


def caption_test_splits(demo: Demo, table: Timetable, _: Journal) -> None:
    """Caption the test splits; the modalities are assigned to as many processes as ranks."""
    order = list(world.MODALITIES)
    model = str(demo.model(RUNS[-1]))
    parts: list[Path] = []
    lanes: list[list[DemoProcess]] = []
    for i in range(demo.ranks):
        parts.append(demo.out / f"captions-{i}.jsonl")
        datasets = [str(demo.toy / modality) for modality in order[i :: demo.ranks]]
        command = [sys.executable, "-m", "onellm_dist.evaluation.captioning", model]
        lanes.append([_make_process(demo, f"captions {i}", [*command, str(parts[-1]), *datasets])])

    def show(running: Sequence[DemoProcess]) -> None:
        table.show_progress(min((process.read_progress() for process in running), default=1.0))

    run_lanes(lanes, show)
    lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: order.index(json.loads(line)["modality"]))
    demo.captions.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _make_process(
    demo: Demo,
    name: str,
    command: Sequence[str],
    *,
    count_pattern: str = COUNT,
    kill_at: float | None = None,
) -> DemoProcess:
    threads = max(1, (os.cpu_count() or 1) // RANKS)
    return DemoProcess(
        name,
        command,
        demo.log(name.replace(" ", "_")),
        {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",
            # Counts of loaded weights look like the process's own.
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
        count_pattern,
        kill_at,
    )


def find_command(name: str) -> str:
    """Find a command of this environment.

    Raises:
        OneLLMError: it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise OneLLMError(
            f"there is no command {name}",
            "the demo runs it.",
            f"install the package with its dependencies: {get_install_command()}",
        )
    return found
