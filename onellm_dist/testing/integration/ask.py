"""Asks one model, loaded once, many questions.

    python -m onellm_dist.testing.integration.ask MODEL MAX_NEW_TOKENS < questions.json

Reads a JSON list of `{"inputs": [[modality, file], ...], "prompt": ...}` and prints one JSON object
per answer. It calls the same functions as `onellm generate`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onellm_dist.common.output import write_output
from onellm_dist.serving.generate import (
    DecodingOptions,
    build_prompt,
    choose_dtype,
    generate,
)
from onellm_dist.serving.media import read_files


def ask_questions(
    model_dir: Path, questions: Sequence[dict[str, Any]], max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield the fields of each question's `Answer`, in order.

    Args:
        model_dir: a onellm directory.
        questions: `inputs` (pairs of modality and file) and `prompt` of each.
        max_new_tokens: length of the longest answer.
    """
    from onellm_dist.model.presets import load_model

    model, processor = load_model(path=model_dir, preset=None, seed=0, **choose_dtype(model_dir))
    for question in questions:
        values = read_files([(name, Path(file)) for name, file in question["inputs"]])
        text = build_prompt(question["prompt"], "auto")
        decoding = DecodingOptions(max_new_tokens=max_new_tokens)
        yield asdict(generate(model, processor.tokenizer, text, values, decoding=decoding))


if __name__ == "__main__":
    for answer in ask_questions(Path(sys.argv[1]), json.load(sys.stdin), int(sys.argv[2])):
        write_output(json.dumps(answer), flush=True)
