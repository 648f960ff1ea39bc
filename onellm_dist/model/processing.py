"""From prompts and media files to the model's inputs: a processor of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
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
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.modalities.files import read_file_value
from onellm_dist.model.folder_code.files import PROCESSOR_MAP
from onellm_dist.model.saving import KeepsSums

_log = get_logger(__name__)


class OneLLMProcessor(KeepsSums, ProcessorMixin):
    """A tokenizer and the evaluation transforms of all modalities.

    `processor(text="Describe the image.", image="x.jpg")` gives `input_ids`, `attention_mask` and
    `image_values`.

    Args:
        tokenizer: the LLM's tokenizer.
        kwargs: as of transformers' ProcessorMixin.
    """

    # transformers declares a plain list, not a ClassVar.
    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"
    code_map = PROCESSOR_MAP

    def __init__(self, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)  # type: ignore[no-untyped-call]  # transformers'
        self.tokenizer = tokenizer

    def __call__(self, text: str | Sequence[str] = "", **media: Any) -> BatchFeature:
        """Turn prompts and media into inputs of `generate`.

        Args:
            text: a prompt, or B of them. BOS is put before each; batches are padded on the left.
                Control tokens in it (`</s>`) are read as text, as in training.
            media: by name of a modality: a file, a tensor of the modality's value shape, the raw
                signal that the modality's `transform` takes, what its `make_raw` takes (a
                `PIL.Image` of any mode, an array of its pixels), or a list of B of these.

        Returns:
            input_ids [B, S], attention_mask [B, S], and `<modality>_values` [B, *value_shape] for
            each modality given.

        Raises:
            UsageError: an unknown modality, a missing file, a list whose length is not B, or a
                prompt with a control token that the tokenizer cannot read as text, or with a token
                that the LLM has no embedding of.
            SampleError: a file is not readable media of its modality.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        data: dict[str, torch.Tensor] = self._encode(prompts)
        for name, given in media.items():
            if given is None:
                continue
            if name not in all_modalities():
                raise UsageError(
                    f"unknown modality {name!r}",
                    "the model would ignore it.",
                    f"give any of: {', '.join(all_modalities())}.",
                )
            items = list(given) if isinstance(given, list | tuple) else [given]
            if len(items) != len(prompts):
                raise UsageError(
                    f"{len(items)} {name} inputs for {len(prompts)} prompts",
                    "every prompt needs one input.",
                    "give as many inputs as prompts.",
                )
            data[f"{name}_values"] = torch.stack([_read_value(name, item) for item in items])
        return BatchFeature(data)

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        start = get_start_id(self.tokenizer)
        if start is None:
            raise UsageError(
                "the tokenizer has no BOS token",
                "media spans stand behind it.",
                "set `tokenizer.bos_token`.",
            )
        rows = [[start, *self._encode_prompt(prompt)] for prompt in prompts]
        beyond = find_tokens_without_embedding(self.tokenizer)
        found = describe_tokens_without_embedding({i for row in rows for i in row}, beyond)
        if found is not None:
            raise UsageError(
                f"a prompt has {found}, which the LLM has no embedding of",
                "the LLM cannot read it.",
                "leave it out of the prompt.",
            )
        longest = max(map(len, rows))
        pad = next(
            i
            for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            if i is not None and i not in beyond
        )
        ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def _encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt; control tokens in it are text, as in training."""
        ids: list[int] = self.tokenizer(
            prompt, add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        if problem := describe_control_token(ids, list_forbidden_ids(self.tokenizer)):
            raise UsageError(
                problem,
                "the LLM would take it for the end or the beginning of a text.",
                "remove it from the prompt.",
            )
        written = find_control_token(prompt, list_control_tokens(self.tokenizer).values())
        if written is not None:
            _log.warning(
                "the prompt contains %r, which is read as text, as in training; a conversation in "
                "the LLM's chat template is encoded by onellm_dist.data.text.TextEncoder "
                "(encode_prompt)",
                written,
            )
        return ids

    def apply_chat_template(self, *args: Any, tokenize: bool = False, **kwargs: Any) -> Any:
        """Render a conversation in the tokenizer's chat template.

        Args:
            args: as of the tokenizer's method.
            tokenize: must be false: turns could write control tokens, and BOS would be missing or
                doubled.
            kwargs: as of the tokenizer's method.

        Raises:
            UsageError: `tokenize` is true.
        """
        if tokenize:
            raise UsageError(
                "apply_chat_template(tokenize=True)",
                "its ids differ from those of training: control tokens in a turn would count, and "
                "BOS would be missing or doubled.",
                "use TextEncoder(tokenizer, 'chat', n).encode_prompt(turns) of "
                "onellm_dist.data.text, or `onellm generate --format chat`.",
            )
        return self.tokenizer.apply_chat_template(*args, tokenize=False, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Turn rows of token ids into texts, as the tokenizer does."""
        return cast(list[str], self.tokenizer.batch_decode(*args, **kwargs))

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Turn token ids into a text, as the tokenizer does."""
        return cast(str, self.tokenizer.decode(*args, **kwargs))


def _read_value(name: str, item: Any) -> torch.Tensor:
    """One medium in any of its forms -> [*value_shape]."""
    modality = get_modality(name)
    if isinstance(item, torch.Tensor) and tuple(item.shape) == tuple(modality.value_shape):
        if not item.is_floating_point():
            raise _make_item_error(name, item, "the model's input has floats, after the transform")
        return item.float()
    if isinstance(item, str) and "://" in item:
        raise UsageError(f"{name}: {item} is a URL", "nothing is fetched.", "download it first.")
    if isinstance(item, str | Path):
        path = Path(item)
        if not path.is_file():
            raise UsageError(f"no file {path}", f"it was given as {name}.", "check the path.")
        return read_file_value(modality, path)
    raw = modality.make_raw(item)
    try:
        return modality.make_value(raw, train=False, rng=np.random.default_rng(0))
    except (AttributeError, TypeError, IndexError) as error:  # not what its transform takes
        raise _make_item_error(name, item, str(error)) from error


def _make_item_error(name: str, item: Any, why: str) -> UsageError:
    kind = type(item).__name__
    if isinstance(item, torch.Tensor | np.ndarray):
        kind = f"{kind} of {item.dtype} and shape {tuple(item.shape)}"
    return UsageError(
        f"a {kind} is not a medium of modality {name}: {why}",
        "the model would be given something else than it was trained on.",
        f"give a file's path, or a float tensor {list(get_modality(name).value_shape)} that the "
        "modality's transform made; pictures also as PIL.Image or uint8 array.",
    )
