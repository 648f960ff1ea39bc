"""PointLLM's answer file: for its program, in which another model compares objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.tasks.answer_files import encode_json


def write_results(answers: Sequence[GivenAnswer]) -> Mapping[str, bytes]:
    """`{"prompt", "results": [{"object_id", "ground_truth", "model_output"}]}`."""
    results = [
        {
            "object_id": a.question.extra["object_id"],
            "ground_truth": a.question.answers[0] if a.question.answers else "",
            "model_output": a.text,
        }
        for a in answers
    ]
    prompt = answers[0].asked if answers else ""  # the same for all
    return {"objaverse.json": encode_json({"prompt": prompt, "results": results})}


def check_results(name: str, content: bytes) -> Sequence[str]:
    """Check the keys, and that no object is repeated."""
    try:
        value = json.loads(content)
        results = value["results"]
        ids = [row["object_id"] for row in results]
        wrong = [r for r in results if set(r) != {"object_id", "ground_truth", "model_output"}]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{name} has another form: {type(error).__name__}: {error}"]
    repeated = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    return [
        *(f"an entry has the keys {sorted(row)}" for row in wrong),
        *(f"object {i} is repeated" for i in repeated),
    ]
