"""`onellm evaluate --group`: a group of ranks answers what a rank alone would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.evaluation.evaluate import EvaluationOptions, evaluate_model
from onellm_dist.evaluation.group_generation import GroupGeneration
from onellm_dist.evaluation.question_format import QuestionFormat
from onellm_dist.evaluation.stop_request import StopRequest


def answer_as_group(
    model: Any,
    tokenizer: Any,
    run: Callable[[Callable[[], Any]], Any],
    tasks: Sequence[str],
    data: Path,
    out: Path,
    options: EvaluationOptions,
    *,
    identity: str,
    stop: StopRequest,
) -> str:
    """Answer the questions of this group, and say what this rank did.

    Args:
        model: the model, whose weights all ranks of the default process group hold together.
        tokenizer: its tokenizer.
        run: runs a function that calls the model, on all ranks at once.
        tasks: names of tasks.
        data: folder of their datasets.
        out: the output folder.
        options: how they are asked; its ranks are the groups.
        identity: as of `evaluate_model`.
        stop: notices a request to stop.

    Raises:
        StoppedError: the evaluation was asked to stop.
        UsageError: as `evaluate_model`.
        OneLLMError: another rank of the group failed or is gone.
    """
    form = QuestionFormat(tokenizer, options.format)
    group = GroupGeneration(model, run, form, options.batch)
    if not group.is_leader:
        return f"followed in {format_count(group.follow(), 'batch', 'batches')}"
    try:
        found = evaluate_model(
            model,
            tokenizer,
            tasks,
            data,
            out,
            options,
            identity=identity,
            stop=stop,
            generate=group.generate,
        )
    except BaseException as error:
        group.end(error)
        raise
    group.end()
    return (
        f"{format_count(found.prompts, 'question')} answered, {found.new_tokens:,} tokens, "
        f"{found.padding_share:.0%} padding"
    )
