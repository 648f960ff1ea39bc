"""Generation for `onellm generate`: files of any modalities and a prompt in, text out.

Prompt formats (`--format`):
    conversation  the reference's instruction format: its header, `### Human: {prompt}`, and
                  `### Assistant:` (what tune trains)
    chat          the LLM's own chat template (what tune trains with data.text_format=chat)
    raw           BOS, the media, then the prompt unchanged; an empty prompt asks for a caption
                  (what align trains)
    auto          conversation if there is a prompt, else raw

Media stand behind BOS, or where the prompt has placeholders (`Compare <image> and <image>`), as
many as files of that modality.

Decoding ends at EOS, at the stop string `###` (in `chat`: at the template's end of an answer), or
after `max_new_tokens`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onellm_dist.common.errors import UsageError
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.text import HEADER, STOP, TextEncoder, render_answer_prefix, render_turn
from onellm_dist.modalities import SPAN_TOKENS, Part
from onellm_dist.serving.answer_text import AnswerText
from onellm_dist.serving.placed_media import MediaInputs, place_prompt

if TYPE_CHECKING:
    import torch

FORMATS = ("auto", "conversation", "chat", "raw")
OFFSETS = ("correct", "reference")
Ending = Literal["eos", "stop string", "length"]


@dataclass(frozen=True)
class DecodingOptions:
    """How new tokens are chosen."""

    max_new_tokens: int = 128
    """Maximum length of the answer, in tokens."""
    temperature: float = 0.0
    """0 decodes greedily; otherwise nucleus sampling with `top_p`."""
    top_p: float = 0.75
    """Probability mass of the nucleus."""
    seed: int = 1
    """Seed of the sampling."""
    decode_offset: str = "correct"
    """One of OFFSETS; the reference's cache is two positions short."""

    def __post_init__(self) -> None:
        if self.decode_offset not in OFFSETS:
            raise UsageError(
                f"--decode-offset {self.decode_offset}",
                "there is no such mode.",
                f"use {' or '.join(OFFSETS)}.",
            )


@dataclass(frozen=True)
class Answer:
    """What the model generated."""

    text: str
    """The answer without special tokens, cut at the stop string."""
    tokens: int
    """Number of new tokens, including those that ended the answer."""
    ended: Ending
    """What ended the answer."""
    seconds: float
    """Duration of the generation, without loading the model."""


def build_prompt(prompt: str, prompt_format: str) -> str:
    """Return the text after BOS in one of FORMATS.

    Raises:
        UsageError: the format is unknown, or a conversation has no prompt.
    """
    if prompt_format not in FORMATS:
        raise UsageError(
            f"--format {prompt_format}",
            "there is no such prompt format.",
            f"use one of: {', '.join(FORMATS)}.",
        )
    if prompt_format == "raw" or (prompt_format == "auto" and not prompt):
        return prompt
    if not prompt:
        raise UsageError(
            f"--format {prompt_format} without a prompt",
            "a conversation starts with a question.",
            "give a prompt.",
        )
    if prompt_format == "chat":  # the template is applied once the tokenizer is loaded
        return prompt
    return HEADER + render_turn(ConversationTurn("user", prompt)) + render_answer_prefix()


def choose_dtype(model: Path) -> dict[str, Any]:
    """Return the keyword argument `dtype` with which a saved model is loaded.

    On a GPU it is a 16-bit type. On a CPU it is fp32, or bf16 if the model was saved in bf16 and
    the CPU computes in bf16.

    Raises:
        UsageError: the directory's config is damaged.
    """
    import torch

    from onellm_dist.model.presets import check_directory

    check_directory(model)
    if torch.cuda.is_available():
        return {"dtype": torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16}
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    saved = config.get("dtype", config.get("torch_dtype"))
    # `get_capabilities` does not exist in every supported torch
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    hardware = able.get("avx512_bf16") or able.get("amx_bf16")
    return {"dtype": torch.bfloat16 if saved == "bfloat16" and hardware else torch.float32}


def generate(
    model: Any,
    tokenizer: Any,
    text: str,
    values: Mapping[str, torch.Tensor] | MediaInputs,
    *,
    modality_order: Sequence[str] | None = None,
    chat: bool = False,
    decoding: DecodingOptions | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Continue `text` after BOS and the media spans, on the model's device.

    Args:
        model: a OneLLMForConditionalGeneration.
        tokenizer: its fast tokenizer.
        text: the prompt, as `build_prompt` returns it.
        values: modality to [1, *value_shape]; or, where there are several media of a modality,
            several spans of a medium or placeholders in the text, the media in order.
        modality_order: order of the media spans; default: the model's own.
        chat: whether `text` is a question to put into the LLM's chat template.
        decoding: how new tokens are chosen; default: greedily.
        on_text: called with the answer's text, piece by piece, as it comes.

    Raises:
        UsageError: prompt, media spans and new tokens exceed the LLM's context, or the model lacks
            a modality.
        SampleError: the placeholders do not fit the media.
    """
    import torch

    decoding = decoding or DecodingOptions()
    encoder = TextEncoder(tokenizer, "chat", sys.maxsize) if chat else None
    ids, values, placed = _encode(model, tokenizer, text, values, encoder, modality_order)
    spans = [name for name, rows in values.items() for _ in rows]
    _check_inputs(model, ids.shape[1], spans, decoding.max_new_tokens)
    end_ids = encoder.end_ids if encoder else [tokenizer.eos_token_id]
    stop_text = (encoder.end_text if encoder else STOP) or ""
    stop = _StopString(tokenizer, stop_text) if stop_text else None
    options = _build_options(tokenizer, end_ids, stop, decoding)
    media = {f"{name}_values": value.to(model.device) for name, value in values.items()}
    torch.manual_seed(decoding.seed)
    model.eval()
    ids = ids.to(model.device)
    streams = decoding.decode_offset == "correct"  # else two calls make the answer
    if on_text and streams:
        options["streamer"] = _Streamer(tokenizer, stop_text, on_text)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, torch.ones_like(ids), **placed, **options, **media)
    seconds = time.perf_counter() - started
    new = out[0, ids.shape[1] :].tolist()
    decoded = tokenizer.decode(new, skip_special_tokens=True)
    stopped = bool(stop) and stop_text in decoded
    ended: Ending = "eos" if set(end_ids) & set(new) else "stop string" if stopped else "length"
    answer = (decoded.split(stop_text)[0] if stop else decoded).strip()
    if on_text and not streams:
        on_text(answer)
    return Answer(text=answer, tokens=len(new), ended=ended, seconds=seconds)


def _encode(
    model: Any,
    tokenizer: Any,
    text: str,
    values: Mapping[str, torch.Tensor] | MediaInputs,
    chat: TextEncoder | None,
    order: Sequence[str] | None,
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor], dict[str, Any]]:
    """The prompt's [1, S] ids, modality to values, and arguments that say where media stand."""
    import torch

    if not isinstance(values, Mapping):
        names = list(model.config.modalities)
        prompt = place_prompt(tokenizer, text, values, names, chat=chat is not None, order=order)
        return torch.tensor([prompt.ids]), prompt.values, {"media_spans": [prompt.spans]}
    placed = {"modality_order": order}
    if chat is None:
        return encode_prompt(tokenizer, text), values, placed
    return torch.tensor([chat.encode_prompt([ConversationTurn("user", text)])]), values, placed


def encode_prompt(tokenizer: Any, text: str) -> torch.Tensor:
    """Return the [1, S] int64 ids of BOS and `text`, exactly as training encodes them."""
    import torch

    encoder = TextEncoder(tokenizer, "caption", sys.maxsize)
    ids, _ = encoder.encode({"txt": Part("txt", text.encode("utf-8"))})
    return torch.tensor([ids[:-1]])  # without the caption's EOS


def _check_inputs(
    model: Any, prompt_tokens: int, modalities: Sequence[str], max_new_tokens: int
) -> None:
    if missing := sorted(set(modalities) - set(model.config.modalities)):
        raise UsageError(
            f"the model does not have the modality {', '.join(missing)}",
            "it cannot read the file.",
            "use a model that was trained on it.",
        )
    from onellm_dist.model.llm.positions import get_context

    context = get_context(model.config.text_config, model.llm_support)
    length = prompt_tokens + SPAN_TOKENS * len(modalities) + max_new_tokens
    if context is not None and length > context:
        raise UsageError(
            f"prompt, media and new tokens take {length} positions",
            f"the LLM has {context}.",
            "shorten the prompt or --max-new-tokens.",
        )


def _build_options(
    tokenizer: Any, end_ids: Sequence[int], stop: _StopString | None, decoding: DecodingOptions
) -> dict[str, Any]:
    """Return the keyword arguments of transformers' `generate`."""
    from transformers import StoppingCriteriaList

    pad = tokenizer.pad_token_id
    sampling = (
        {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p}
        if decoding.temperature > 0
        else {"do_sample": False}
    )
    return {
        "decode_offset": decoding.decode_offset,
        "max_new_tokens": decoding.max_new_tokens,
        "eos_token_id": list(end_ids) if len(end_ids) > 1 else end_ids[0],
        "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
        "stopping_criteria": StoppingCriteriaList([stop] if stop else []),
        **sampling,
    }


class _StopString:
    """Ends generation when new text contains the stop string (a transformers StoppingCriteria)."""

    TAIL_TOKENS = 8

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer = tokenizer
        self.text = text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        import torch

        tails = self.tokenizer.batch_decode(
            input_ids[:, -self.TAIL_TOKENS :].tolist(), skip_special_tokens=True
        )
        return torch.tensor([self.text in tail for tail in tails], device=input_ids.device)


class _Streamer:
    """Hands on the text of an answer as its tokens come (a transformers streamer)."""

    def __init__(self, tokenizer: Any, stop_text: str, on_text: Callable[[str], None]) -> None:
        self._text = AnswerText(tokenizer, [stop_text] if stop_text else [])
        self._on_text = on_text
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens; the first call has the prompt's."""
        if not self._is_prompt:
            for token in value.flatten().tolist():
                self._hand_on(self._text.add(token))
        self._is_prompt = False

    def end(self) -> None:
        """Hand on what was held back."""
        self._hand_on(self._text.finish())

    def _hand_on(self, text: str) -> None:
        if text:
            self._on_text(text)
