"""Our own directory: config, safetensors, processor and model card; in and out."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.card import write_card
from onellm_dist.convert.checkpoint import (
    ConversionOptions,
    OpenedCheckpoint,
    OutputPlan,
    build_on_meta,
    drop_tied_copies,
    fit_tensors,
    get_parameter_shapes,
)
from onellm_dist.convert.folder_kinds import refuse_impossible_sizes, refuse_quantised
from onellm_dist.convert.formats.hf import read_config
from onellm_dist.convert.names.from_pretrained import rename_state
from onellm_dist.convert.tensors.lazy import Shapes
from onellm_dist.convert.tensors.safetensors_files import read_folder
from onellm_dist.convert.tensors.writers import split_into_files, write_index
from onellm_dist.convert.tokenizers import has_tokenizer, load_tokenizer
from onellm_dist.model.adapters.folder import is_adapter
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.generation.settings import read_generation, write_generation
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.processing.processor import OneLLMProcessor
from onellm_dist.model.spans.trained import get_spans

NAME = "onellm"
KIND = "onellm"
ORDER = 0
ABOUT = "A onellm directory."
EXAMPLE = "runs/tune/model"
DEFAULT_TARGET = "reference"


def is_format(path: Path) -> bool:
    """Whether a path is a folder whose config.json is ours, with weights of a whole model."""
    return has_config(path) and not is_adapter(path)


def has_config(path: Path) -> bool:
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
    raw = read_config(path) or {}
    refuse_quantised(path, raw)
    refuse_impossible_sizes(path, raw)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model = build_on_meta(lambda: OneLLMForConditionalGeneration(config))
    except Exception as error:  # whatever a config of any content makes transformers raise
        raise UsageError(
            f"{path}/config.json: {(str(error).splitlines() or [type(error).__name__])[0][:300]}",
            "the model cannot be built.",
            "restore the config.json of these weights.",
        ) from None
    state, files = read_folder(path)
    kept, copies, problems = drop_tied_copies(rename_state(state, model), model)
    tensors, ignored, more = fit_tensors(
        {key: (key, tensor) for key, tensor in kept.items()},
        {name: tuple(p.shape) for name, p in model.named_parameters()},
    )
    return OpenedCheckpoint(
        NAME,
        KIND,
        config,
        tensors,
        files,
        path,
        (*copies, *ignored),
        (*problems, *more),
        generation=read_generation(path),
    )


def get_onellm_shapes(config: OneLLMConfig) -> Shapes:
    """Shapes of a OneLLM's parameters; tied ones are listed once."""
    return get_parameter_shapes(lambda: OneLLMForConditionalGeneration(config))


def plan_output(opened: OpenedCheckpoint, options: ConversionOptions) -> OutputPlan:
    """A directory that `from_pretrained`, `onellm generate` and the Hub accept.

    Raises:
        UsageError: the tokenizer cannot be read, or the config has no numbers as spans.
    """
    spans = get_spans(opened.config)
    files = split_into_files(list(opened.tensors.items()), options.shard_bytes)
    source = options.tokenizer or opened.root
    tokenizer = load_tokenizer(source) if options.tokenizer or has_tokenizer(source) else None

    def finish(folder: Path) -> None:
        config = opened.config
        config.architectures = [OneLLMForConditionalGeneration.__name__]
        config.dtype = opened.dtype
        config.save_pretrained(folder)
        write_generation(folder, opened.generation, config.text_config)
        write_index(folder, files)
        if tokenizer is not None:
            OneLLMProcessor(tokenizer, spans=spans).save_pretrained(folder)
        write_card(folder, opened)

    return OutputPlan(files, finish)
