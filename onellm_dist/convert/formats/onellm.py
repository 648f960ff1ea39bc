"""Our own directory: config, safetensors, processor and model card; in and out."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.convert.card import write_card
from onellm_dist.convert.checkpoint import (
    ConversionOptions,
    OpenedCheckpoint,
    OutputPlan,
    fit_tensors,
    get_parameter_shapes,
)
from onellm_dist.convert.formats.hf import read_config
from onellm_dist.convert.tensors.lazy import Shapes
from onellm_dist.convert.tensors.safetensors_files import read_folder
from onellm_dist.convert.tensors.writers import split_into_files, write_index
from onellm_dist.convert.tokenizers import has_tokenizer, load_tokenizer
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.processing import OneLLMProcessor

NAME = "onellm"
KIND = "onellm"
ORDER = 0
ABOUT = "A onellm directory."
EXAMPLE = "runs/tune/model"
DEFAULT_TARGET = "reference"


def is_format(path: Path) -> bool:
    """Whether a path is a folder whose config.json is ours."""
    config = read_config(path)
    return config is not None and config.get("model_type") == OneLLMConfig.model_type


def open_checkpoint(path: Path, options: ConversionOptions) -> OpenedCheckpoint:
    """Open the directory `path`.

    Raises:
        UsageError: not such a directory, or files are missing.
    """
    if not is_format(path):
        raise UsageError(
            f"no OneLLM in {path}",
            "its config.json is missing or of another model.",
            "give a onellm directory.",
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OneLLMError) as error:
        raise UsageError(
            f"{path}/config.json: {str(error).splitlines()[0]}",
            "the model cannot be built.",
            "fix it.",
        ) from None
    state, files = read_folder(path)
    tied = config.text_config.tie_word_embeddings
    tensors, ignored, problems = fit_tensors(
        {key: (key, tensor) for key, tensor in state.items()},
        get_onellm_shapes(config),
        ignore=lambda key: tied and key == "llm.lm_head.weight",
    )
    return OpenedCheckpoint(NAME, KIND, config, tensors, files, path, ignored, problems)


def get_onellm_shapes(config: OneLLMConfig) -> Shapes:
    """Shapes of a OneLLM's parameters; tied ones are listed once."""
    return get_parameter_shapes(lambda: OneLLMForConditionalGeneration(config))


def plan_output(opened: OpenedCheckpoint, options: ConversionOptions) -> OutputPlan:
    """A directory that `from_pretrained`, `onellm generate` and the Hub accept.

    Raises:
        UsageError: the tokenizer cannot be read.
    """
    files = split_into_files(list(opened.tensors.items()), options.shard_bytes)
    source = options.tokenizer or opened.root
    tokenizer = load_tokenizer(source) if options.tokenizer or has_tokenizer(source) else None

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

    return OutputPlan(files, finish)
