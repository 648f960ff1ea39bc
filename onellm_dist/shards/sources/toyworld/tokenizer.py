"""The toy tokenizer: a Hugging Face fast tokenizer with one token for every word of the toy world.

It is byte-level, as GPT-2's: any other text is spelled in bytes and decodes back exactly. Special
tokens and their ids are LLaMA's, and like LLaMA's it puts `<s>` in front unless
`add_special_tokens=False`. The committed asset is the output of `build_toy_tokenizer`.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from onellm_dist.shards.sources.toyworld import world

ASSET = Path(__file__).resolve().parents[3] / "model" / "assets" / "toy_tokenizer"
"""Folder of the committed tokenizer."""
VOCABULARY = 512
"""Size of the table; reserved tokens fill it, so that a new word changes no shape of the model."""
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
_HEADER = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.\n\n"
    "### Human: \n### Assistant: \n### "
)
_QUESTIONS = (
    "What is this? What color is it? Which shape is it? Where is it? How does it move? "
    "How many are there? Is it a photo? Yes No "
    "Provide a one-sentence caption for the provided sound cloud map object picture. "
    "Answer the question using a single word or phrase. "
    "I see hear nothing something thing not sure in of with from under over near moving still "
    "bright dark"
)
"""Words beyond the captions that people type to the toy model; each is one token."""
# fmt: off
_WITHOUT_SPACE = (
    "A", "The", "What", "Which", "Where", "How", "Is",
    "Provide", "Answer", "Yes", "No", "I", "Human", "Assistant",
)
# fmt: on


def list_vocabulary_words() -> list[str]:
    """List the groups of characters that are one token, in a fixed order.

    They are in byte-level spelling: a leading space is `Ġ`.
    """
    texts = [_HEADER, _QUESTIONS, *_WITHOUT_SPACE]
    for modality, scene in world.SCENES.items():
        # The first word of a caption has no space as a text of its own, and one as an answer.
        texts.extend((scene.prompt, f" {scene.prompt}", f" {modality}"))
        fixed_words = re.sub(r"\{\w+\}", "", scene.template)
        texts.extend((fixed_words, " " + fixed_words))
        texts.extend(f" {value}" for values in scene.attributes.values() for value in values)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return list(dict.fromkeys(piece for text in texts for piece, _ in split.pre_tokenize_str(text)))


def build_toy_tokenizer(out: Path) -> None:
    """Write the tokenizer's files; their bytes depend on nothing but the world.

    Args:
        out: the folder of `tokenizer.json` and `tokenizer_config.json`.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary: dict[str, int] = {token: i for i, token in enumerate((UNK, BOS, EOS))}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    for word in list_vocabulary_words():
        vocabulary.setdefault(word, len(vocabulary))
    reserved = [f"<reserved_{i}>" for i in range(VOCABULARY - len(vocabulary))]
    if len(vocabulary) > VOCABULARY:
        raise AssertionError(
            f"the toy world has {len(vocabulary)} tokens, "
            f"more than the {VOCABULARY} of the toy model"
        )
    for token in reserved:
        vocabulary[token] = len(vocabulary)
    # No merges: a word that is in the vocabulary is one token, any other stays bytes.
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS, *reserved)]
    )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=UNK,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def load_toy_tokenizer() -> PreTrainedTokenizerFast:
    """Load the committed tokenizer."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(ASSET)
    return tokenizer


def build_files() -> dict[str, bytes]:
    """Build the tokenizer anew; the committed files must equal these.

    Returns:
        File name to bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        build_toy_tokenizer(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


if __name__ == "__main__":
    build_toy_tokenizer(ASSET)
