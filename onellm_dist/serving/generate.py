"""`onellm generate`: files of any modalities and a prompt in, text out.

Prompt formats (`--format`):
    conversation  the reference's instruction format: its header, `### Human: {prompt}`, `### Assistant:` (what tune trains)
    chat          the LLM's own chat template (what tune trains with data.text_format=chat)
    raw           BOS, the inputs, then the prompt as it is; an empty prompt asks for a caption (what align trains)
    auto          conversation where there is a prompt, else raw

Decoding ends at EOS, at the stop string `###` (in `chat`: at the template's end of an answer), or after `max_new_tokens`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onellm_dist.common.errors import EXIT_DONE, OneLLMError, SampleError, UsageError
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.text import (
    HEADER,
    STOP,
    TextEncoder,
    render_answer_prefix,
    render_turn,
)
from onellm_dist.modalities import SPAN_TOKENS, Part, get_modality

if TYPE_CHECKING:
    import torch

FORMATS = ("auto", "conversation", "chat", "raw")
OFFSETS = ("correct", "reference")


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without special tokens, cut at the stop string.
        tokens: new tokens, the ones that ended it included.
        ended: why it stopped.
        seconds: of generation, without loading.
    """

    text: str
    tokens: int
    ended: Literal["eos", "stop string", "length"]
    seconds: float


def generate_command(
    model: Path,
    prompt: str,
    given: Sequence[tuple[str, Path]],
    *,
    order: str = "",
    prompt_format: str = "auto",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 0.75,
    seed: int = 1,
    decode_offset: str = "correct",
) -> int:
    """Print the answer on stdout (and, on a terminal, how it ended on stderr).

    Files are read before the model is loaded, so that a bad one is reported at once.

    Raises:
        UsageError: no such model, file, format or order, or nothing was asked.
        SampleError: a file is no readable media of its modality.
    """
    if decode_offset not in OFFSETS:
        raise UsageError(
            f"--decode-offset {decode_offset}",
            "there is no such mode.",
            f"use {' or '.join(OFFSETS)}.",
        )
    text = prompt_text(prompt, prompt_format)
    if not prompt and not given:
        raise UsageError(
            "neither a prompt nor a file was given",
            "there is nothing to answer.",
            "see onellm generate --help.",
        )
    if not (model / "config.json").is_file():
        raise UsageError(
            f"{model}: no onellm directory",
            "it has no config.json.",
            "give what training exported: RUN_DIR/model.",
        )
    arrangement = run_order(order, [name for name, _ in given])
    values = read_files(given)

    from onellm_dist.model.presets import load_model

    network, processor = load_model(path=model, preset=None, seed=seed, **placement(model))
    answer = generate(
        network,
        processor.tokenizer,
        text,
        values,
        modality_order=arrangement,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        decode_offset=decode_offset,
        chat=prompt_format == "chat",
    )
    print(answer.text)
    if sys.stderr.isatty():
        print(
            f"({answer.tokens} tokens in {answer.seconds:.1f} s, ended by {answer.ended})",
            file=sys.stderr,
        )
    return EXIT_DONE


def prompt_text(prompt: str, prompt_format: str) -> str:
    """The text behind BOS in one of FORMATS.

    Raises:
        UsageError: an unknown format, or a conversation without a prompt.
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
            "give the prompt.",
        )
    if prompt_format == "chat":  # the tokenizer's template is applied once it is there
        return prompt
    return HEADER + render_turn(ConversationTurn("user", prompt)) + render_answer_prefix()


def run_order(order: str, names: Sequence[str]) -> list[str] | None:
    """The modalities in the order that `--order` asks for; None for the model's own order.

    Raises:
        UsageError: a modality is given twice, or the order does not name each one once.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"several files of modality {', '.join(twice)}",
            "the model reads one input a modality.",
            "give one file for each.",
        )
    if not order:
        return None
    wanted = [name.strip() for name in order.split(",")]
    if sorted(wanted) != sorted(names):
        raise UsageError(
            f"--order {order}: the inputs given are {', '.join(names) or 'none'}",
            "each must be named once.",
            "name them by comma.",
        )
    return wanted


def read_files(files: Sequence[tuple[str, Path]]) -> dict[str, torch.Tensor]:
    """Files to model inputs with the evaluation transforms: modality -> [1, *value_shape] fp32.

    Raises:
        UsageError: a file is not there, or no modality has this name.
        SampleError: a file cannot be decoded; the message begins with its name.
    """
    import numpy as np

    values = {}
    for name, path in files:
        modality = get_modality(name)
        if not path.is_file():
            raise UsageError(
                f"--{name} {path}: no such file", "there is nothing to read.", "check the path."
            )
        try:
            raw = modality.decode(modality.read_parts(path), _side_json(path))
            values[name] = modality.transform(raw, train=False, rng=np.random.default_rng(0))[None]
        except SampleError as error:
            message = error.what if str(path) in error.what else f"{path}: {error.what}"
            raise SampleError(message, error.why, error.do) from error
        except OSError as error:
            raise OneLLMError(
                f"{path}: {error.strerror or error}",
                "the file cannot be read.",
                "check its permissions and disk.",
            ) from error
    return values


def _side_json(path: Path) -> Mapping[str, Any]:
    """The object in `<stem>.json` beside a file, as a sample of a dataset has it; empty where there is none."""
    side = path.with_name(f"{path.name.split('.', 1)[0]}.json")
    if not side.is_file():
        return {}
    try:
        meta = json.loads(side.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SampleError(
            f"{side}: no JSON: {error}", f"it describes {path.name}.", "mend it, or move it away."
        ) from None
    return meta if isinstance(meta, dict) else {}


def placement(model: Path) -> dict[str, Any]:
    """`dtype` for loading a directory: 16 bits on a GPU; on a CPU fp32, or bf16 where it was saved so and the CPU computes in it."""
    import torch

    if torch.cuda.is_available():
        return {"dtype": torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16}
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    saved = config.get("dtype", config.get("torch_dtype"))
    able: Mapping[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # not in every torch that is supported
    hardware = able.get("avx512_bf16") or able.get("amx_bf16")
    return {"dtype": torch.bfloat16 if saved == "bfloat16" and hardware else torch.float32}


def generate(
    model: Any,
    tokenizer: Any,
    text: str,
    values: Mapping[str, torch.Tensor],
    *,
    modality_order: Sequence[str] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 0.75,
    seed: int = 1,
    decode_offset: str = "correct",
    chat: bool = False,
) -> Answer:
    """Continue `text` after BOS and the runs of `values`, on the model's device.

    Args:
        model: a OneLLMForConditionalGeneration.
        tokenizer: its fast tokenizer.
        text: as `prompt_text` gives it.
        values: modality -> [1, *value_shape].
        chat: `text` is the question, to be put into the LLM's chat template.
        temperature: 0 is greedy; otherwise nucleus sampling with `top_p`.

    Raises:
        UsageError: prompt, runs and new tokens are longer than the LLM's context, or the model lacks a modality.
    """
    import torch
    from transformers import StoppingCriteriaList

    encoder = TextEncoder(tokenizer, "chat", sys.maxsize) if chat else None
    ids = (
        torch.tensor([encoder.encode_prompt([ConversationTurn("user", text)])])
        if encoder
        else prompt_ids(tokenizer, text)
    ).to(model.device)
    if missing := [name for name in values if name not in model.config.modalities]:
        raise UsageError(
            f"the model has no modality {', '.join(missing)}",
            "it cannot read the file.",
            "use a model that was trained on it.",
        )
    context = getattr(model.config.text_config, "max_position_embeddings", None)
    length = ids.shape[1] + SPAN_TOKENS * len(values) + max_new_tokens
    if context is not None and length > context:
        raise UsageError(
            f"prompt, inputs and new tokens make {length} positions",
            f"the LLM has {context}.",
            "shorten the prompt or --max-new-tokens.",
        )
    ends = encoder.end_ids if encoder else [tokenizer.eos_token_id]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False}
    )
    stop = None if chat else _StopString(tokenizer)
    torch.manual_seed(seed)
    model.eval()
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            torch.ones_like(ids),
            modality_order=modality_order,
            decode_offset=decode_offset,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends if chat else ends[0],
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([stop] if stop else []),
            **sampling,
            **{f"{name}_values": value.to(model.device) for name, value in values.items()},
        )
    new = out[0, ids.shape[1] :].tolist()
    said = tokenizer.decode(new, skip_special_tokens=True)
    ended: Literal["eos", "stop string", "length"] = (
        "eos" if set(ends) & set(new) else "stop string" if stop and STOP in said else "length"
    )
    return Answer(
        (said.split(STOP)[0] if stop else said).strip(),
        len(new),
        ended,
        time.perf_counter() - started,
    )


def prompt_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """[1, S] int64 token ids of BOS and `text`, exactly as training encodes them."""
    import torch

    encoder = TextEncoder(tokenizer, "caption", sys.maxsize)
    ids, _ = encoder.encode({"txt": Part("txt", text.encode("utf-8"))})
    return torch.tensor([ids[:-1]])  # without the caption's EOS


class _StopString:
    """Ends generation when the new text holds the stop string (transformers' StoppingCriteria protocol)."""

    TAIL_TOKENS = 8

    def __init__(self, tokenizer: Any) -> None:
        self.text, self.tokenizer = STOP, tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        import torch

        tails = self.tokenizer.batch_decode(
            input_ids[:, -self.TAIL_TOKENS :].tolist(), skip_special_tokens=True
        )
        return torch.tensor([self.text in tail for tail in tails], device=input_ids.device)
