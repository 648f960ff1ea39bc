"""Run by test_evaluate_group.py on each rank: `onellm`, with a fault on one of the ranks.

python group_ranks.py FAULT RANK ARGUMENTS...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from onellm_dist.cli import main
from onellm_dist.evaluation import group_generation

patched: Any = group_generation


def kill_at_second_batch() -> None:
    generate, calls = patched.generate_batch, list[int]()

    def generate_once(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*args, **options)

    patched.generate_batch = generate_once


def compute_noise() -> None:
    """As if rounding were quite another on this rank's device; and print the tokens it takes."""
    generate = patched.generate_batch

    def generate_from_noise(model: Any, *args: Any, **options: Any) -> Any:
        head = model.llm.get_output_embeddings()
        noise = head.register_forward_pre_hook(lambda _, x: (torch.randn_like(x[0]), *x[1:]))
        found = generate(model, *args, **options)
        noise.remove()
        for answer in found:
            print("took", *answer.tokens)
        return found

    patched.generate_batch = generate_from_noise


FAULTS: dict[str, Callable[[], None]] = {
    "kill": kill_at_second_batch,
    "noise": compute_noise,
    "none": lambda: None,
}

if __name__ == "__main__":
    fault, rank, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        FAULTS[fault]()
    code: Any = 0
    try:
        main(arguments)
    except SystemExit as ended:
        code = ended.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
