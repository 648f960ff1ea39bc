"""Run by test_evaluate_group.py on each rank: `onellm`, with a fault on some of the ranks.

python group_ranks.py FAULT RANK ARGUMENTS...

RANK `all`: on every rank.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from onellm_dist.cli import main
from onellm_dist.evaluation import evaluate, group_generation
from onellm_dist.model.generation import rows as generation_rows
from onellm_dist.model.generation.sampling import RowSampling
from onellm_dist.model.weights import lazy as lazy_weights

patched: Any = group_generation
SHORT_S, LONG_S = 5, 9


def kill_at_second_batch() -> None:
    act_at_second_batch(lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_at_second_batch() -> None:
    def fail() -> None:
        raise RuntimeError

    act_at_second_batch(fail)


def act_at_second_batch(act: Callable[[], None]) -> None:
    generate, calls = patched.generate_batch, list[int]()

    def generate_once(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            act()
        return generate(*args, **options)

    patched.generate_batch = generate_once


def compute_noise() -> None:
    """As if rounding were quite another on this rank's device; and print the tokens it takes."""
    generate = patched.generate_batch
    rows: Any = generation_rows.AnswerRow

    def draw(_: Any) -> RowSampling:
        return RowSampling(100.0, 1.0, random.random())

    def generate_from_noise(model: Any, *args: Any, **options: Any) -> Any:
        head = model.llm.get_output_embeddings()
        noise = head.register_forward_pre_hook(lambda _, x: (torch.randn_like(x[0]), *x[1:]))
        found = generate(model, *args, **options)
        noise.remove()
        for answer in found:
            print("took", *answer.tokens)
        return found

    patched.generate_batch = generate_from_noise
    rows.draw = draw


def be_asked_to_stop_and_read_slowly() -> None:
    """The stop is asked for while the model loads; reading takes longer than collectives wait."""
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    loading: Any = lazy_weights
    reading: Any = evaluate
    open_model, read_media = loading.open_model, reading.read_media
    prepare = patched.GroupGeneration.__init__

    def open_when_asked(**options: Any) -> Any:
        (out / "stop").touch()
        return open_model(**options)

    def read_slowly(*args: Any) -> Any:
        time.sleep(LONG_S)
        return read_media(*args)

    def wait_shortly(*args: Any) -> None:
        defaults: Any = distributed_c10d
        defaults.default_pg_timeout = timedelta(seconds=SHORT_S)
        prepare(*args)

    loading.open_model, reading.read_media = open_when_asked, read_slowly
    patched.GroupGeneration.__init__ = wait_shortly


FAULTS: dict[str, Callable[[], None]] = {
    "fail": fail_at_second_batch,
    "kill": kill_at_second_batch,
    "noise": compute_noise,
    "none": lambda: None,
    "stop": be_asked_to_stop_and_read_slowly,
}

if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if rank in (os.environ["RANK"], "all"):
        FAULTS[fault]()
    code: Any = 0
    try:
        main(arguments)
    except SystemExit as ended:
        code = ended.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
