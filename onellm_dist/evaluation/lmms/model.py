"""A saved model that answers lmms-eval's requests through the same code as `onellm evaluate`.

lmms-eval --model onellm --model_args pretrained=runs/tune/model --tasks mme --batch_size 16
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from onellm_dist.common.errors import UsageError
from onellm_dist.common.progress import progress
from onellm_dist.evaluation.evaluate import WINDOW
from onellm_dist.evaluation.lmms.media import read_media_of_prompt
from onellm_dist.evaluation.loading import load_for_evaluation
from onellm_dist.evaluation.question_format import QuestionFormat
from onellm_dist.model.generation.batched import BATCH, MediaCache, Prompt, generate_batch

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
        _, ids = self._form.encode("\n".join(texts))
        spans = read_media_of_prompt(media, getattr(self._model.config, "spans", None) or {})
        temperature = float(settings.get("temperature") or 0.0)
        return Prompt(
            ids,
            spans,
            int(settings.get("max_new_tokens") or NEW_TOKENS),
            temperature if settings.get("do_sample", temperature > 0) else 0.0,
            float(settings.get("top_p") or 1.0),
        )


def _list_ends(until: Any) -> list[str]:
    """The texts that end an answer."""
    ends = [until] if isinstance(until, str) else list(until or ())
    return [end for end in ends if end]


def _cut(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end, maxsplit=1)[0]
    return text.strip()
