"""Tasks that one span cannot solve and several can: held-out accuracy with one and with several.

    python benchmarks/spans.py                       # about ten minutes on one core
    python benchmarks/spans.py --tasks pair --span-positions learned

`picture`: 448 x 448 pixels of noise, and somewhere a texture with a period of 2 pixels; which one?
With one span the picture is 224 x 224, where the texture is even grey. Several:
`data.spans: {image: 5}`, the whole picture and four tiles.

`pair`: two grey pictures; which one is brighter? With one span the first picture alone is there.

`sound`: 15 s of noise, and in the last 4 s a low or a high tone. With one span the first 10 s are
heard. Several: `data.spans: {audio: 2}`, two windows.

A small model is trained from random weights, everything but the encoder, by `Trainer`, from shards,
through plan and packing. A held-out sample counts as right if each token of its answer is the
likeliest one, which is what greedy decoding would write. *Shuffled* gives every sample the media of
another one, drawn at random from all that are held out. Exit code 1 if several spans are not above
one span and above the control, with whole 95% intervals (Wilson's).
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig

from onellm_dist import Trainer
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.evaluation.scorers.captions import Interval, wilson_interval
from onellm_dist.model import (
    OneLLMConfig,
    OneLLMForConditionalGeneration,
    OneLLMProcessor,
    load_model,
)
from onellm_dist.model.configuration import OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.packed import PackedBatch
from onellm_dist.shards.format.media import LISTED, make_numbered_parts
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.shards.tools.index_existing import index_existing_shards

Draw = Callable[[np.random.Generator], tuple[list[bytes], str]]
"""Makes the media of a sample, and its answer."""
ENDINGS = {"image": "png", "audio": "wav"}
SIDE, PATCH = 448, 144
RATE, SECONDS = 8000, 15


@dataclass(frozen=True)
class SpanTask:
    """A task, and what decides how many spans it is given."""

    name: str
    modality: str
    draw: Draw
    spans: Mapping[str, int]
    """`data.spans` of several; empty: a sample then lists several media."""
    steps: int
    """Steps of training that it needs, of 16 samples each."""


@dataclass(frozen=True)
class TaskResult:
    """Held-out accuracy of one training."""

    task: str
    spans: int
    accuracy: Interval
    shuffled: Interval
    cpu_minutes: float


def draw_picture(draw: np.random.Generator) -> tuple[list[bytes], str]:
    """Noise with a texture that no picture of half the size shows."""
    at = np.arange(PATCH)
    sign = 1.0 - 2.0 * (at % 2)
    answer = ("upright", "level", "chequered")[int(draw.integers(3))]
    across, down = (np.ones(PATCH) if answer == a else sign for a in ("level", "upright"))
    window = np.hanning(PATCH)  # an edge would be seen at any size
    pixels = 128 + draw.normal(0, 2, (SIDE, SIDE))
    left, top = 2 * draw.integers(0, (SIDE - PATCH) // 2, 2)
    texture = 90 * np.outer(window * down, window * across)
    pixels[top : top + PATCH, left : left + PATCH] += texture
    return [to_png(pixels)], answer


def draw_pair(draw: np.random.Generator) -> tuple[list[bytes], str]:
    """Two greys: what the first one is says nothing about which is brighter."""
    first = draw.uniform(90, 165)
    second = first + (60 if draw.integers(2) else -60)
    pixels = [grey + draw.normal(0, 4, (56, 56)) for grey in (first, second)]
    return [to_png(p) for p in pixels], "the first" if first > second else "the second"


def draw_sound(draw: np.random.Generator) -> tuple[list[bytes], str]:
    """Noise, and late a tone."""
    seconds = np.arange(SECONDS * RATE) / RATE
    pitch, answer = ((400, "low"), (2500, "high"))[int(draw.integers(2))]
    start = draw.uniform(11, SECONDS - 2)
    tone = np.sin(2 * np.pi * pitch * seconds) * ((seconds > start) & (seconds < start + 2))
    signal = 12000 * tone + draw.normal(0, 300, len(seconds))
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(signal.astype("<i2").tobytes())
    return [out.getvalue()], answer


def to_png(pixels: np.ndarray) -> bytes:
    """A grey picture as a file."""
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB").save(out, "PNG")
    return out.getvalue()


TASKS = (
    SpanTask("picture", "image", draw_picture, {"image": 5}, 100),
    SpanTask("pair", "image", draw_pair, {}, 60),
    SpanTask("sound", "audio", draw_sound, {"audio": 2}, 60),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and test each task with one span and with several; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(task.name for task in TASKS)
    parser.add_argument("--tasks", default=names, help=f"some of {names}")
    parser.add_argument("--steps", type=int, help="of 16 samples each; default: the task's own")
    parser.add_argument("--held-out", type=int, default=150, help="samples that are tested")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--span-positions", choices=("none", "fixed", "learned"), default="none")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [task for task in TASKS if task.name in given.tasks.split(",")]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for task in chosen:
            for several in (False, True):
                root = Path(folder) / f"{task.name}-{several}"
                results.append(run_task(task, several, root, given))
                print(describe(results[-1]), flush=True)
    return report(results)


def run_task(task: SpanTask, several: bool, root: Path, given: argparse.Namespace) -> TaskResult:
    """Train a small model on a task, and test it."""
    started, lists = time.process_time(), not task.spans
    steps = given.steps or task.steps
    write_samples(task, root / "data", 16 * steps, given.held_out, several or not lists)
    save_model(root / "start", task.modality)
    config = make_config(task, several, root, given)
    outcome = Trainer.from_config(config).fit()
    if outcome.status != "done":
        raise RuntimeError(f"{task.name}: {outcome.status}: {outcome.reason}")
    right, wrong, spans = test_model(config, task, given.held_out)
    minutes = (time.process_time() - started) / 60
    return TaskResult(task.name, spans, right, wrong, minutes)


def save_model(folder: Path, modality: str) -> None:
    """Save a small model with random weights."""
    tokenizer = load_toy_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    vision = OneLLMVisionConfig(width=64, layers=1, heads=4, patch_size=28, output_dim=32)
    upm = OneLLMUPMConfig(experts=1, blocks=2, heads=4, ffn=128, router_hidden=64)
    config = OneLLMConfig(vision=vision, upm=upm, text_config=text, modalities=[modality])
    model = OneLLMForConditionalGeneration(config)
    initialise(model, 0)
    model.save_pretrained(folder)
    OneLLMProcessor(tokenizer).save_pretrained(folder)


def write_samples(task: SpanTask, root: Path, train: int, test: int, whole: bool) -> None:
    """Write shards of both splits; without `whole` each sample has its first medium alone."""
    attributes = {} if task.spans else LISTED
    with DatasetWriter(
        root / task.name, name=task.name, modalities=(task.modality,), attributes=attributes
    ) as writer:
        for split, count, seed in (("train", train, 0), ("test", test, 1)):
            for number in range(count):
                media, answer = task.draw(np.random.default_rng([seed, number]))
                writer.add(split, f"{split}-{number:06d}", make_parts(task, media, answer, whole))
    if task.spans:
        index_existing_shards(root / task.name, media=True)


def make_parts(
    task: SpanTask, media: Sequence[bytes], answer: str, whole: bool
) -> dict[str, bytes]:
    """The parts of a sample."""
    ending = ENDINGS[task.modality]
    if task.spans:
        return {ending: media[0], "txt": answer.encode()}
    kept = media if whole else media[:1]
    parts, _ = make_numbered_parts((task.modality, {ending: medium}) for medium in kept)
    return {**parts, "txt": answer.encode()}


def make_config(task: SpanTask, several: bool, root: Path, given: argparse.Namespace) -> RunConfig:
    """The recipe of one training."""
    steps = given.steps or task.steps
    raw: dict[str, Any] = {
        "run": {"dir": root / "run"},
        "model": {"path": root / "start", "span_positions": given.span_positions},
        "data": {
            "root": root / "data",
            "mixture": [{"path": task.name}],
            "global_batch": 16,
            "workers": 0,
            "pack_llm_tokens": 4096,
            "pack_encoder_tokens": 49152,
            "spans": dict(task.spans) if several else {},
            "augment": False,
        },
        "train": {"stage": "joint", "steps": steps, "precision": "fp32", "log_every": 20},
        "optim": {"lr": given.rate, "warmup_steps": 10, "grad_clip": 1.0},
        "engine": {"name": "fsdp"},
        "checkpoint": {"every": steps},
        "launch": {"ranks": 1},
    }
    return RunConfig.model_validate(raw)


@torch.inference_mode()
def test_model(config: RunConfig, task: SpanTask, samples: int) -> tuple[Interval, Interval, int]:
    """Accuracy on the split `test`, that of the control, and spans of a sample."""
    model, processor = load_model(path=config.run.dir / "model", preset=None, seed=0)
    model.train(False)
    data = config.data.model_copy(update={"global_batch": samples})
    names = list(model.config.modalities)
    plan = Plan.open(data, processor.tokenizer, 0, names, split="test", show=False)
    reader = Reader(plan.corpus)
    batches = [reader.read(micro) for micro in plan.step(0, 1).ranks[0]]
    (spans,) = {len(own) for batch in batches for own in batch.modalities}
    if sum(len(batch.sample_ids) for batch in batches) != samples:
        raise RuntimeError(f"not all of {samples} held-out samples were read")
    right = sum(count_right(model, batch) for batch in batches)
    shuffled = sum(
        count_right(model, batch) for batch in exchange_media(batches, task.modality, spans)
    )
    return wilson_interval(right, samples), wilson_interval(shuffled, samples), spans


def exchange_media(
    batches: Sequence[PackedBatch], modality: str, spans: int
) -> Iterator[PackedBatch]:
    """The batches with every sample's media replaced by another one's, drawn at random."""
    values = torch.cat([batch.values[modality] for batch in batches])
    order = np.random.default_rng(0).permutation(len(values) // spans)
    giver = np.empty_like(order)
    giver[order] = np.roll(order, 1)  # a circle: nobody keeps its own
    rows = torch.from_numpy((giver[:, None] * spans + np.arange(spans)).ravel())
    for batch, own in zip(
        batches, rows.split([len(batch.values[modality]) for batch in batches]), strict=True
    ):
        yield replace(batch, values={**batch.values, modality: values[own]})


def count_right(model: Any, batch: PackedBatch) -> int:
    """How many samples have each token of their answer as the likeliest one."""
    logits, supervised, _ = model.compute_packed_logits(batch)
    hits = logits.argmax(-1) == batch.labels[supervised]
    sample = torch.repeat_interleave(
        torch.arange(len(batch.text_token_counts)), torch.tensor(batch.text_token_counts)
    )[supervised]
    return len(batch.text_token_counts) - len(set(sample[~hits].tolist()))


def describe(result: TaskResult) -> str:
    """A row of the table."""
    return (
        f"| {result.task} | {result.spans} | {result.accuracy} | {result.shuffled} | "
        f"{result.cpu_minutes:.1f} |"
    )


def report(results: Sequence[TaskResult]) -> int:
    """Print the table; return 1 if several spans are not above one and above the control."""
    print("\n| task | spans | held-out accuracy | shuffled | CPU minutes |\n|---|---|---|---|---|")
    print("\n".join(map(describe, results)))
    missed = [
        several.task
        for one, several in zip(results[::2], results[1::2], strict=True)
        if not (
            several.accuracy.is_above(one.accuracy) and several.accuracy.is_above(several.shuffled)
        )
    ]
    print(
        f"limits: several above one and above shuffled: {'MISSED by ' if missed else 'met'}", end=""
    )
    print(", ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
