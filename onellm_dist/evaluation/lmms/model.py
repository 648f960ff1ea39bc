"""A saved model that answers lmms-eval's requests through the same code as `onellm evaluate`.

lmms-eval --model onellm --model_args pretrained=runs/tune/model --tasks mme --batch_size 16
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.progress import progress
from onellm_dist.evaluation.evaluate import WINDOW, load_for_evaluation
from onellm_dist.evaluation.question_format import QuestionFormat
from onellm_dist.modalities import Part, get_modality
from onellm_dist.model.batched_generation import (
    BATCH,
    MediaCache,
    Medium,
    Prompt,
    generate_batch,
)

NEW_TOKENS = 128
"""Most tokens of an answer for which the task has no limit."""


class LmmsModel(lmms):  # type: ignore[misc]  # lmms-eval has an environment of its own
    """The model `onellm` of lmms-eval.

    Args:
        pretrained: the model's folder.
        batch_size: prompts answered together.
        format: one of `question_format.FORMATS`.
        device: lmms-eval's option; the first GPU is used where there is one.
        options: options that lmms-eval gives to every model; others are refused.

    Raises:
        UsageError: there is no model, an unknown option, or several processes.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = BATCH,
        format: str = "conversation",
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(options) - {"max_batch_size", "device_map"}):
            raise UsageError(
                f"--model_args {unknown[0]}: the model onellm has no such option",
                "it would do nothing.",
                "use pretrained, batch_size and format.",
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "several processes of lmms-eval",
                "each would answer every question.",
                "start one; `onellm evaluate` answers on any number of ranks.",
            )
        self._model, tokenizer = load_for_evaluation(Path(pretrained), 0)
        self._form = QuestionFormat(tokenizer, format)
        self._batch = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests in windows, each sorted by length, and return the answers in order."""
        cache, answers = MediaCache(), list[str]()
        size = WINDOW * self._batch
        with progress(len(requests), "Answering", unit="requests") as bar:
            for first in range(0, len(requests), size):
                window = [request.args for request in requests[first : first + size]]
                answers += self._answer(window, cache)
                bar.advance(len(window))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:3], answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: the model answers, it does not score given answers.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the model onellm has no log-likelihoods: choose other tasks")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of several rounds.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the model onellm answers one round: choose other tasks")

    def _answer(self, window: Sequence[tuple[Any, ...]], cache: MediaCache) -> list[str]:
        prompts, limits = [], []
        for _, to_messages, settings, doc_id, task, split in window:
            document = self.task_dict[task][split][doc_id]
            messages = ChatMessages(messages=to_messages(document))
            prompts.append(self._make_prompt(messages, settings))
            limits.append(_list_ends(settings.get("until")))
        found = generate_batch(
            self._model,
            prompts,
            end_ids=self._form.end_ids,
            stop=self._form.stop,
            batch=self._batch,
            media_cache=cache,
        )
        texts = (self._form.decode(continuation.tokens) for continuation in found)
        return [_cut(text, ends) for text, ends in zip(texts, limits, strict=True)]

    def _make_prompt(self, messages: Any, settings: Mapping[str, Any]) -> Prompt:
        texts, media = [], list[tuple[str, Any]]()
        for message in messages.messages:
            for content in message.content:
                if content.type == "text":
                    texts.append(content.text)
                else:
                    media.append((content.type, content.url))
        media.sort(key=lambda pair: get_modality(pair[0]).order)  # as training lays them out
        _, ids = self._form.encode("\n".join(texts))
        spans = [medium for name, given in media for medium in read_medium(name, given)]
        temperature = float(settings.get("temperature") or 0.0)
        return Prompt(
            ids,
            spans,
            int(settings.get("max_new_tokens") or NEW_TOKENS),
            temperature if settings.get("do_sample", temperature > 0) else 0.0,
            float(settings.get("top_p") or 1.0),
        )


def read_medium(name: str, given: Any) -> Iterator[Medium]:
    """Read a medium as lmms-eval gives it: a path, a PIL picture, or an array with its rate.

    Args:
        name: name of the modality, which is lmms-eval's word for the content too.
        given: the medium.

    Raises:
        SampleError: it cannot be read.
    """
    modality, rng = get_modality(name), np.random.default_rng(0)
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        try:
            part = Part(path.suffix.removeprefix(".").lower(), path.read_bytes())
        except OSError as error:
            raise SampleError(f"{path}: {error.strerror}") from None
        matched = dict.fromkeys(modality.match({part.extension}), part)
        value = modality.read_value(matched, {}, train=False, rng=rng)
    else:
        picture = given.convert("RGB") if hasattr(given, "convert") else given
        value = modality.transform(modality.make_raw(picture), train=False, rng=rng)
    yield Medium(name, value, f"{name} {_digest(value)}")


def _digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()


def _list_ends(until: Any) -> list[str]:
    """The texts that end an answer."""
    ends = [until] if isinstance(until, str) else list(until or ())
    return [end for end in ends if end]


def _cut(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end, maxsplit=1)[0]
    return text.strip()
