"""A question about files, as `onellm generate` has it: read first, then answered by a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.placeholders import check_placeholders
from onellm_dist.modalities import all_modalities
from onellm_dist.serving.generate import (
    Answer,
    DecodingOptions,
    build_prompt,
    choose_dtype,
    generate,
)
from onellm_dist.serving.media import read_media
from onellm_dist.serving.placed_media import MediaInputs, needs_places


@dataclass(frozen=True)
class PreparedQuestion:
    """A prompt and its files as they are read, before the model is loaded."""

    text: str
    """What `build_prompt` made of the prompt."""
    media: MediaInputs
    """The files, decoded."""
    placed: bool
    """Whether the media are more than one span of each modality behind BOS."""
    order: list[str] | None
    """The order of the media; None: the model's own."""
    chat: bool
    """Whether the text goes into the LLM's chat template."""


def prepare_question(
    model: Path,
    prompt: str,
    files: Sequence[tuple[str, Path]],
    *,
    order: str = "",
    prompt_format: str = "auto",
) -> PreparedQuestion:
    """Read a question's files before the model is loaded, so that a bad one is reported at once.

    Args:
        model: a directory of a saved model.
        prompt: the question; empty asks for a caption.
        files: (modality, file) pairs.
        order: order of the media without placeholders, as modalities separated by commas; default:
            the model's own.
        prompt_format: one of FORMATS.

    Raises:
        UsageError: the model, a file, the format or the order does not exist, or there is neither
            a prompt nor a file.
        SampleError: a file is not readable media of its modality.
    """
    text = build_prompt(prompt, prompt_format)
    if not prompt and not files:
        raise UsageError(
            "neither a prompt nor a file was given",
            "there is nothing to answer.",
            "see onellm generate --help.",
        )
    if not (model / "config.json").is_file():
        raise UsageError(
            f"{model}: not the directory of a saved model",
            "it has no config.json.",
            "give the directory that training exported: RUN_DIR/model.",
        )
    media_order = parse_order(order, [name for name, _ in files])
    media = read_media(files, read_spans(model))
    placed = _needs_places(text, media)
    return PreparedQuestion(text, media, placed, media_order, prompt_format == "chat")


def open_for_generation(model: Path) -> tuple[Any, Any]:
    """Load a model to generate with.

    Args:
        model: a directory of a saved model.

    Returns:
        The model and its tokenizer.
    """
    from onellm_dist.model.presets import load_model

    network, processor = load_model(path=model, preset=None, seed=0, **choose_dtype(model))
    return network, processor.tokenizer


def answer_prepared(
    opened: tuple[Any, Any],
    question: PreparedQuestion,
    decoding: DecodingOptions | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Let a model answer a question.

    Args:
        opened: the model and its tokenizer.
        question: the question.
        decoding: how new tokens are chosen; default: greedily.
        on_text: called with the answer's text, piece by piece, as it comes.

    Raises:
        UsageError: as of `generate`.
        SampleError: as of `generate`.
    """
    return generate(
        *opened,
        question.text,
        question.media if question.placed else dict(question.media),
        modality_order=question.order,
        chat=question.chat,
        decoding=decoding,
        on_text=on_text,
    )


def _needs_places(text: str, media: MediaInputs) -> bool:
    """Whether a prompt is more than one span of each modality behind BOS.

    Raises:
        UsageError: its placeholders do not fit the media.
    """
    names = [name for name, _ in media]
    try:
        if not needs_places(text, names, [len(values) for _, values in media]):
            return False
        check_placeholders(text, names, list(all_modalities()))
    except SampleError as error:
        what = error.what.replace("its text", "the prompt")
        raise UsageError(what, error.why, error.do) from error
    return True


def parse_order(order: str, names: Sequence[str]) -> list[str] | None:
    """Return the modalities in the order that `--order` asks for; None for the model's own order.

    Raises:
        UsageError: the order does not name each modality once.
    """
    if not order:
        return None
    wanted = [name.strip() for name in order.split(",")]
    if sorted(wanted) != sorted(set(names)):
        raise UsageError(
            f"--order {order}: the modalities given are {', '.join(names) or 'none'}",
            "the order must name each of them once.",
            "separate them by commas.",
        )
    return wanted


def read_spans(model: Path) -> dict[str, int]:
    """Return the spans that the media of a question may take: as the model was trained.

    Args:
        model: the directory of a saved model.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return {}  # opening the model says what is wrong
    spans = config.get("spans") if isinstance(config, dict) else None
    return dict(spans) if isinstance(spans, dict) else {}
