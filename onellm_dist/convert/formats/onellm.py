"""Our own directory: config, sharded safetensors with their index, processor, generation config, model card; in and out."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.convert.card import write_card
from onellm_dist.convert.checkpoint import Opened, Options, Plan, Shapes, fitted, parameter_shapes
from onellm_dist.convert.formats.hf import read_config
from onellm_dist.convert.tensors.safetensors_files import read_folder
from onellm_dist.convert.tensors.writers import safetensor_shards, write_index
from onellm_dist.convert.tokenizers import has_tokenizer, load_tokenizer
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.processing import OneLLMProcessor

NAME, KIND = "onellm", "onellm"


def recognise(path: Path) -> bool:
    """A folder whose config.json is ours."""
    config = read_config(path)
    return config is not None and config.get("model_type") == OneLLMConfig.model_type


def open_checkpoint(path: Path, options: Options) -> Opened:
    """Open the directory `path`.

    Raises:
        UsageError: not such a directory, or files are missing.
    """
    if not recognise(path):
        raise UsageError(
            f"no OneLLM in {path}",
            "its config.json says otherwise or is missing.",
            "give a onellm directory.",
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OneLLMError) as error:
        raise UsageError(
            f"{path}/config.json: {str(error).splitlines()[0]}",
            "the model cannot be built.",
            "mend it.",
        ) from None
    state, files = read_folder(path)
    tied = config.text_config.tie_word_embeddings
    tensors, ignored, problems = fitted(
        {k: (k, t) for k, t in state.items()},
        onellm_shapes(config),
        ignore=lambda key: tied and key == "llm.lm_head.weight",
    )
    return Opened(NAME, KIND, config, tensors, files, path, ignored, problems)


def onellm_shapes(config: OneLLMConfig) -> Shapes:
    """The parameters of a OneLLM; tied ones stand once."""
    return parameter_shapes(lambda: OneLLMForConditionalGeneration(config))


def plan(opened: Opened, options: Options) -> Plan:
    """A directory that `from_pretrained`, `onellm generate` and the Hub take."""
    files = safetensor_shards(list(opened.tensors.items()), options.shard_bytes)
    words = options.tokenizer or opened.root
    tokenizer = load_tokenizer(words) if options.tokenizer or has_tokenizer(words) else None

    def finish(folder: Path) -> None:
        config = opened.config
        config.architectures = [OneLLMForConditionalGeneration.__name__]
        config.dtype = opened.dtype
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config.text_config).save_pretrained(folder)
        write_index(folder, files)
        if tokenizer is not None:
            OneLLMProcessor(tokenizer).save_pretrained(folder)
        write_card(folder, opened)

    return Plan(files, finish)
