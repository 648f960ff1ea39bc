"""The token that begins every text: BOS, or what stands for it where a tokenizer has none."""

from __future__ import annotations

from typing import Any

_SEPARATORS = ("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>")
"""Special tokens between documents of pretraining, after which a text begins as after a BOS."""


def get_start_id(tokenizer: Any) -> int | None:
    """Id of the first token of every text, which media spans follow.

    Qwen's and Falcon's tokenizers have no BOS: their LLMs saw texts begin after `<|endoftext|>`
    (Qwen2's config names it as BOS), so this token is taken; else EOS.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        The id; None: the tokenizer has neither a BOS nor an EOS.
    """
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    found = next((special[name] for name in _SEPARATORS if name in special), None)
    return tokenizer.eos_token_id if found is None else int(found)
