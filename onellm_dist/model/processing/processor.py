"""From prompts and media to the model's inputs: a processor of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import BatchFeature, ProcessorMixin

from onellm_dist.common.control_tokens import (
    describe_control_token,
    find_control_token,
    list_control_tokens,
    list_forbidden_ids,
)
from onellm_dist.common.errors import UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.start_token import get_start_id
from onellm_dist.common.token_limit import (
    describe_tokens_without_embedding,
    find_tokens_without_embedding,
)
from onellm_dist.model.folder_code.files import PROCESSOR_MAP
from onellm_dist.model.processing.chat import encode_conversation, render_conversations
from onellm_dist.model.processing.content_parts import Conversation, HeldMedium, read_conversation
from onellm_dist.model.processing.media import list_media, name_modality, stack_media
from onellm_dist.model.processing.placed import (
    encode_placed,
    encode_prompt_media,
    make_placed_features,
    needs_placing,
    needs_spans,
)
from onellm_dist.model.processing.rows import Padding, make_features
from onellm_dist.model.saving import KeepsSums

_log = get_logger(__name__)


class OneLLMProcessor(KeepsSums, ProcessorMixin):
    """A tokenizer and the evaluation transforms of all modalities.

    `processor(text="Describe the image.", images="x.jpg")` gives `input_ids`, `attention_mask` and
    `image_values`.

    Args:
        tokenizer: the LLM's tokenizer.
        spans: `data.spans` of the model's training; default: one span a medium.
        kwargs: as of transformers' ProcessorMixin.
    """

    # transformers declares a plain list, not a ClassVar.
    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"
    code_map = PROCESSOR_MAP
    spans: Mapping[str, int] = {}  # what a saved processor does not have

    def __init__(
        self, tokenizer: Any, spans: Mapping[str, int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(tokenizer, **kwargs)  # type: ignore[no-untyped-call]  # transformers'
        self.tokenizer = tokenizer
        self.set_spans(spans or {})

    def set_spans(self, spans: Mapping[str, int]) -> None:
        """Let media take as many spans as in a training.

        Args:
            spans: `data.spans` of the training; {}: one span a medium.
        """
        vars(self).pop("spans", None)
        if spans:
            self.spans = dict(spans)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = True,
        sampling_rate: float | None = None,
        **media: Any,
    ) -> BatchFeature:
        """Turn prompts and media into inputs of `generate`.

        Args:
            text: a prompt, or B of them. BOS is put before each. Control tokens in it (`</s>`) are
                read as text, as in training.
            return_tensors: `pt`, `np`, or None for lists.
            padding: True or `longest`, `max_length`, or False.
            padding_side: `left` (for `generate`) or `right`.
            truncation: whether prompts are cut at their ends to `max_length` tokens.
            max_length: tokens of a prompt, BOS included.
            pad_to_multiple_of: rows are filled up to a multiple of it.
            add_special_tokens: must be true: media stand behind BOS.
            sampling_rate: samples per second of sounds that are given as arrays.
            media: by name of a modality or its plural (`image=`, `images=`, `audio=`, `videos=`): a
                file, its bytes, a `data:` URL, a tensor of the modality's value shape, the raw
                signal that the modality's `transform` takes, what its `make_raw` takes (a
                `PIL.Image` of any mode, an array of its pixels), or a list of B of these, which may
                be nested.

        Returns:
            input_ids [B, S], attention_mask [B, S], and `<modality>_values` [B, *value_shape] for
            each modality given.

        Raises:
            UsageError: an unknown modality, a missing file, a list whose length is not B, a prompt
                with a control token that the tokenizer cannot read as text, or with a token that
                the LLM has no embedding of, or an option that has no meaning here.
            SampleError: a file is not readable media of its modality.
        """
        prompts = [text or ""] if text is None or isinstance(text, str) else list(text)
        shape = Padding(
            return_tensors, padding, padding_side, truncation, max_length, pad_to_multiple_of
        )
        if not add_special_tokens:
            raise UsageError(
                "add_special_tokens=False",
                "media stand behind BOS, and control tokens in a text are read as text.",
                "give conversations to apply_chat_template(tokenize=True), or leave it out.",
            )
        rows = [self._encode_prompt(prompt) for prompt in prompts]
        held = _list_media(media, len(prompts))
        if self.spans.keys() & held.keys():
            return self._encode_spans(rows, held, shape, sampling_rate)
        values = {f"{n}_values": stack_media(n, i, sampling_rate) for n, i in held.items()}
        return make_features(self.tokenizer, rows, values, shape)

    def _encode_spans(
        self,
        rows: Sequence[list[int]],
        held: Mapping[str, Sequence[Any]],
        shape: Padding,
        rate: float | None,
    ) -> BatchFeature:
        """Prompts whose media behind BOS take as many spans as in training."""
        if shape.truncation:
            rows = [row[: shape.max_length] for row in rows]
            shape = replace(shape, truncation=None)
        placed = [
            encode_prompt_media(row, [(n, held[n][i]) for n in held], self.spans, rate)
            for i, row in enumerate(rows)
        ]
        return make_placed_features(self.tokenizer, placed, shape, with_masks=False)

    def _encode_prompt(self, prompt: str) -> list[int]:
        """Ids of BOS and a prompt; control tokens in it are text, as in training."""
        if not isinstance(prompt, str):
            raise UsageError(
                f"a prompt is a {type(prompt).__name__}",
                "prompts are texts.",
                "give media by name: images=, audio=.",
            )
        start = get_start_id(self.tokenizer)
        if start is None:
            raise UsageError(
                "the tokenizer has no BOS token",
                "media spans stand behind it.",
                "set `tokenizer.bos_token`.",
            )
        ids: list[int] = self.tokenizer(
            prompt, add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        if problem := describe_control_token(ids, list_forbidden_ids(self.tokenizer)):
            raise UsageError(
                problem,
                "the LLM would take it for the end or the beginning of a text.",
                "remove it from the prompt.",
            )
        self._check_embeddings(ids)
        written = find_control_token(prompt, list_control_tokens(self.tokenizer).values())
        if written is not None:
            _log.warning(
                "the prompt contains %r, which is read as text, as in training; a conversation in "
                "the LLM's chat template is encoded by apply_chat_template(tokenize=True)",
                written,
            )
        return [start, *ids]

    def _check_embeddings(self, ids: Sequence[int]) -> None:
        beyond = find_tokens_without_embedding(self.tokenizer)
        found = describe_tokens_without_embedding(set(ids), beyond)
        if found is not None:
            raise UsageError(
                f"a prompt has {found}, which the LLM has no embedding of",
                "the LLM cannot read it.",
                "leave it out of the prompt.",
            )

    # transformers' signature promises a text alone, and takes options that are refused here.
    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        place_media: bool | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations in the tokenizer's chat template.

        Args:
            conversation: messages whose content is text or content parts (`content_parts.py`), or a
                list of such conversations.
            chat_template: a template in place of the tokenizer's (only without `tokenize`).
            tokenize: whether ids are returned: those of training, with BOS. A turn may not contain
                control tokens then.
            add_generation_prompt: whether the text ends where an answer would begin.
            return_dict: whether `tokenize` gives all inputs of the model, media included.
            return_tensors: as of a call of the processor.
            return_assistant_tokens_mask: whether to add `assistant_masks`: 1 where supervised.
            place_media: whether media stand where their parts do in the turns, or behind BOS;
                default: in the turns of a conversation that has several of a modality, and of all
                if the model was trained with `data.spans`; else behind BOS.
            processor_kwargs: options of a call of the processor (padding and the like).
            kwargs: more; without `tokenize`, variables of the template.

        Raises:
            UsageError: a part cannot be read, or an option that has no meaning here.
            SampleError: the template refuses the conversation, or media cannot be read.
        """
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        given = conversation if several else [conversation]
        found = [read_conversation(c) for c in given]
        if not tokenize:
            texts = render_conversations(
                self.tokenizer,
                [each.turns for each in found],
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
            return texts if several else texts[0]
        if chat_template not in (None, self.tokenizer.chat_template):
            raise UsageError(
                "chat_template with tokenize=True",
                "ids are those of training, which reads the tokenizer's own template.",
                "set processor.tokenizer.chat_template.",
            )
        options = {k: v for k, v in kwargs.items() if v not in (None, False)}
        shape = Padding.from_options({**options, **(processor_kwargs or {})}, return_tensors)
        how = shape, add_generation_prompt, return_assistant_tokens_mask
        data = self._encode_all(given, found, place_media, how)
        return data if return_dict else data["input_ids"]

    def _encode_all(
        self,
        given: Sequence[Any],
        found: Sequence[Conversation],
        place_media: bool | None,
        how: tuple[Padding, bool, bool],
    ) -> BatchFeature:
        """Conversations, each with its media in its turns or behind BOS."""
        places = [
            needs_placing(each, self.spans) if place_media is None else place_media
            for each in found
        ]
        if any(places) or needs_spans(found, self.spans):
            return self._encode_placed(list(zip(given, places, strict=True)), *how)
        return self._encode_conversations(found, *how)

    def _encode_conversations(
        self, found: Sequence[Conversation], shape: Padding, prompt: bool, with_masks: bool
    ) -> BatchFeature:
        encoded = [encode_conversation(self.tokenizer, c.turns, prompt=prompt) for c in found]
        for ids, _ in encoded:
            self._check_embeddings(ids)
        values = self._stack_parts([each.media for each in found])
        masks = [mask for _, mask in encoded] if with_masks else None
        return make_features(self.tokenizer, [ids for ids, _ in encoded], values, shape, masks)

    def _encode_placed(
        self,
        conversations: Sequence[tuple[Any, bool]],
        shape: Padding,
        prompt: bool,
        with_masks: bool,
    ) -> BatchFeature:
        """Conversations whose media stand in their turns, or (False) behind BOS."""
        rows = []
        for each, place in conversations:
            found = read_conversation(each, marks=place)
            rows.append(encode_placed(self.tokenizer, found, self.spans, prompt=prompt))
            self._check_embeddings(rows[-1].ids)
        return make_placed_features(self.tokenizer, rows, shape, with_masks=with_masks)

    def _stack_parts(self, media: Sequence[Sequence[HeldMedium]]) -> dict[str, torch.Tensor]:
        """Values of the media of B conversations, which all have the same modalities."""
        names = [[medium.modality for medium in each] for each in media]
        for each in names:
            if len(set(each)) < len(each) or set(each) != set(names[0]):
                raise UsageError(
                    f"conversations with {', '.join(each) or 'no media'} and "
                    f"{', '.join(names[0]) or 'none'}",
                    "the processor takes one medium of a modality for each conversation, and the "
                    "same modalities for all.",
                    "ask them one at a time.",
                )
        by_name = [{m.modality: m.item for m in each} for each in media]
        return {f"{n}_values": stack_media(n, [each[n] for each in by_name]) for n in names[0]}

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Turn rows of token ids into texts, as the tokenizer does."""
        return cast(list[str], self.tokenizer.batch_decode(*args, **kwargs))

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Turn token ids into a text, as the tokenizer does."""
        return cast(str, self.tokenizer.decode(*args, **kwargs))


def _list_media(media: Mapping[str, Any], prompts: int) -> dict[str, list[Any]]:
    """The media that a call names, one of each modality for each prompt."""
    held: dict[str, list[Any]] = {}
    for key, given in media.items():
        if given is None:
            continue
        name = name_modality(key)
        if name in held:
            raise UsageError(
                f"{name} is given twice, as {name} and in the plural",
                "only one of them could be read.",
                "give one of them.",
            )
        held[name] = list_media(name, given, prompts)
    return held
