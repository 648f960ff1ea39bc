"""`onellm generate`: one option per modality, made from the modalities that exist."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onellm_dist.common.counts import format_count

if TYPE_CHECKING:
    from onellm_dist.serving.generate import Answer
    from onellm_dist.serving.questions import AskedQuestion

DecodeOffset = Annotated[
    str,
    typer.Option(
        help="correct, or reference (repeats the reference's cache, two positions short)."
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR",
        help="An adapter of this model; each question is answered with every one. Repeatable.",
    ),
]


def generate(
    model: Annotated[Path, typer.Argument(help="A onellm directory.")],
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to ask; several are answered one after the other. Without a prompt the "
            "inputs are captioned."
        ),
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(help='Questions, one a line: {"prompt": ..., "image": PATH, ...}.'),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as a JSON object in one line.")
    ] = False,
    adapter: Adapters = None,
    order: Annotated[
        str,
        typer.Option(
            help="Order of the inputs in the sequence, with commas: video,audio.",
            show_default="the model's own",
        ),
    ] = "",
    prompt_format: Annotated[
        str, typer.Option("--format", help="Prompt format: auto, conversation, chat or raw.")
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="Temperature of the sampling; 0: greedy.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="Probability that sampling keeps, if temperature > 0."),
    ] = 0.75,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 1,
    decode_offset: DecodeOffset = "correct",
    **files: Any,
) -> None:
    """Ask a model about files of any modality: before the prompt, or where it says <image>.

    Examples: onellm generate runs/tune/model --image cat.jpg "What is this?"
              onellm generate runs/tune/model --image a.jpg --image b.jpg "<image> or <image>?"
    """
    from onellm_dist.serving.generate import DecodingOptions

    given = [(name, path) for name, paths in files.items() for path in paths or ()]
    decoding = DecodingOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        decode_offset=decode_offset,
    )
    options = {"order": order, "prompt_format": prompt_format, "decoding": decoding}
    raise typer.Exit(_answer(model, prompt or [], jsonl, given, as_json, adapter or (), options))


def _answer(
    model: Path,
    prompts: Sequence[str],
    jsonl: Path | None,
    files: Sequence[tuple[str, Path]],
    as_json: bool,
    adapters: Sequence[str],
    options: Mapping[str, Any],
) -> int:
    """Answer the questions of a command line, and print the answers as they come."""
    from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, UsageError
    from onellm_dist.model.adapters.adapter_set import parse_adapters
    from onellm_dist.serving.questions import AskedQuestion, answer_questions, read_questions

    if jsonl is not None and (prompts or files):
        raise UsageError(
            "--jsonl together with a prompt or files",
            "each line has its own.",
            "put them into the lines.",
        )
    questions = (
        read_questions(jsonl) if jsonl else [AskedQuestion(p, files) for p in prompts or [""]]
    )
    failed = False
    shown: dict[str, Any] = {"on_text": _print_piece, "on_answer": _print_name}
    given = {**options, "adapters": parse_adapters(adapters), **({} if as_json else shown)}
    for question, answer in answer_questions(model, questions, **given):
        named = {"adapter": question.adapter} if question.adapter else {}
        if isinstance(answer, OneLLMError):
            failed = True
            place = f"line {question.line}" if question.line else repr(question.prompt)
            typer.echo(f"onellm: {place}: {answer}", err=True)
            if as_json:
                typer.echo(json.dumps({"prompt": question.prompt, **named, "error": answer.what}))
        elif as_json:
            typer.echo(json.dumps({"prompt": question.prompt, **named, **_describe(answer)}))
        else:
            typer.echo("")
            _print_ending(answer)
    return EXIT_FAILED if failed else EXIT_DONE


def _print_piece(text: str) -> None:
    typer.echo(text, nl=False)


def _print_name(question: AskedQuestion) -> None:
    if question.adapter:
        typer.echo(f"{question.adapter}: ", nl=False)


def _describe(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "tokens": answer.tokens,
        "ended": answer.ended,
        "seconds": round(answer.seconds, 3),
    }


def _print_ending(answer: Answer) -> None:
    if not answer.text.strip():
        typer.echo(f"(the answer is empty; it was ended by {answer.ended})", err=True)
    if sys.stderr.isatty():
        tokens = format_count(answer.tokens, "token")
        typer.echo(f"({tokens} in {answer.seconds:.1f} s, ended by {answer.ended})", err=True)


def _set_options(function: Any, modalities: Sequence[str]) -> None:
    """Replace `**files`, of which typer makes nothing, by an option `--NAME FILE` for each name."""
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[
                list[Path] | None,
                typer.Option(
                    f"--{name}", help=f"File of the modality {name}; repeatable.", metavar="FILE"
                ),
            ],
        )
        for name in modalities
    ]
    parameters = [*_FIXED, *options]
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}


def add_modality_options() -> None:
    """Give `generate` an option for each modality; until then it has none."""
    from onellm_dist.modalities import all_modalities

    _set_options(generate, list(all_modalities()))


*_FIXED, _ = inspect.signature(generate, eval_str=True).parameters.values()
_set_options(generate, ())
