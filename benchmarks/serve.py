"""Requests that are answered at once, over the same requests one by one.

    python benchmarks/serve.py                     # some three minutes on 2 cores

`onellm serve` runs in a process of its own, with the toy model (random weights) on a CPU or a GPU.
Requests differ in the length of their texts, in their media (none, or up to two of five
modalities, read from files) and in how many tokens they ask for. Rounds take turns: one client asks
one by one, then many clients ask others at once. The ratio of the requests per second is to be at
least 3. Printed with it: the share of padding in what the steps attend to, the
mean size of a batch, and the time to the first text.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import soundfile
from PIL import Image

AIM = 3.0
TOKENS = (16, 128)
WORDS = (3, 150)


def main() -> int:
    """Print a table; return 1 if the aim is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--alone", type=int, default=32, help="requests of a round, one by one")
    parser.add_argument("--requests", type=int, default=128, help="of a round, at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--text", action="store_true", help="no media")
    args = parser.parse_args()
    ratios, single, at_once = [], [], []
    with run_server(args.batch) as address:
        asyncio.run(ask_all(address, make_requests(8, seed=999, text=args.text), clients=8))
        before = read_metrics(address)
        for turn in range(args.rounds):
            seed = 2 * turn
            one = make_requests(args.alone, seed=seed, text=args.text)
            many = make_requests(args.requests, seed=seed + 1, text=args.text)
            slow = asyncio.run(ask_all(address, one, clients=1))
            middle = read_metrics(address)
            fast = asyncio.run(ask_all(address, many, clients=args.clients))
            single.append(len(one) / slow)
            at_once.append(len(many) / fast)
            ratios.append(at_once[-1] / single[-1])
            print_round(turn, single[-1], at_once[-1], middle, read_metrics(address))
        print_first_texts(before, read_metrics(address))
    ratio = statistics.median(ratios)
    print(f"requests/s, median: {statistics.median(single):.1f} one by one, ", end="")
    print(f"{statistics.median(at_once):.1f} by {args.clients} clients: ratio {ratio:.2f}")
    print(f"aim {AIM}: {'reached' if ratio >= AIM else 'MISSED'}")
    return int(ratio < AIM)


@contextmanager
def run_server(batch: int) -> Iterator[str]:
    """Serve the toy model; yields the address."""
    from onellm_dist.model.presets import load_model

    with tempfile.TemporaryDirectory() as folder:
        model, processor = load_model(path=None, preset="toy", seed=0)
        model.save_pretrained(Path(folder) / "toy")
        processor.save_pretrained(Path(folder) / "toy")
        command = [
            *(sys.executable, "-m", "onellm_dist.cli", "serve", f"{folder}/toy", "--port", "0"),
            *("--batch", str(batch), "--format", "conversation"),
        ]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                assert process.stdout is not None
                line = next(line for line in process.stdout if line.startswith("serving "))
                yield line.split(" on ")[1].strip().removesuffix("/v1")
            finally:
                process.terminate()
                process.wait()


def make_requests(count: int, *, seed: int, text: bool) -> list[dict[str, Any]]:
    """Requests of which no two are alike."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        words = " ".join(rng.choice(["red", "circle", "what", "is", "left"], rng.integers(*WORDS)))
        media = [] if text else [make_part(rng) for _ in range(rng.integers(0, 3))]
        content = [*media, {"type": "text", "text": words}]
        found.append(
            {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": int(rng.integers(*TOKENS)),
                "temperature": 1.0,  # other texts, and no endless repetition of one token
                "seed": int(rng.integers(1 << 30)),
            }
        )
    return found


def make_part(rng: np.random.Generator) -> dict[str, Any]:
    """A medium of one of five modalities."""
    buffer = io.BytesIO()
    modality = str(rng.choice(["image", "audio", "point", "imu", "fmri"]))
    if modality == "image":
        pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480)).save(buffer, "JPEG")
    elif modality == "audio":
        soundfile.write(buffer, rng.normal(0, 0.1, 16000), 16000, format="WAV")
    else:
        shape = {"point": (2000, 6), "imu": (6, 400), "fmri": (15724,)}[modality]
        np.save(buffer, rng.random(shape).astype(np.float32))
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "onellm", "modality": modality, "data": data}


async def ask_all(address: str, requests: list[dict[str, Any]], *, clients: int) -> float:
    """Seconds until all requests are answered by so many clients."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    left = list(reversed(requests))

    async def work() -> None:
        while left:
            answer = await client.chat.completions.create(model="toy", **left.pop())
            assert answer.choices[0].finish_reason

    began = time.perf_counter()
    async with client:
        await asyncio.gather(*(work() for _ in range(clients)))
    return time.perf_counter() - began


def read_metrics(address: str) -> dict[str, float]:
    """The counters of the server."""
    with urllib.request.urlopen(f"{address}/metrics") as response:
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(onellm_\w+) (\S+)$", text, re.M)}


def print_round(
    turn: int, single: float, at_once: float, before: dict[str, float], after: dict[str, float]
) -> None:
    """Print a line of a round; the metrics are those around the requests that came at once."""
    spent = {name: after[name] - before.get(name, 0) for name in after}
    padding, real = (
        spent["onellm_padding_positions_total"],
        spent["onellm_continued_positions_total"],
    )
    batches = spent["onellm_batch_size_count"]
    print(
        f"round {turn}: {single:.1f} requests/s one by one, {at_once:.1f} at once "
        f"({at_once / single:.2f} ×); padding {padding / max(padding + real, 1):.3f}, "
        f"{spent['onellm_batch_size_sum'] / batches:.1f} requests a batch, "
        f"{spent['onellm_completion_tokens_total']:.0f} tokens",
        flush=True,
    )


def print_first_texts(before: dict[str, float], after: dict[str, float]) -> None:
    """Print the mean time to the first text, of all requests of both kinds."""
    count = after["onellm_first_token_seconds_count"] - before["onellm_first_token_seconds_count"]
    seconds = after["onellm_first_token_seconds_sum"] - before["onellm_first_token_seconds_sum"]
    print(f"mean time to the first text: {seconds / count:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
