"""The model card (README.md) of a onellm directory: its parts, its origin, its licences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onellm_dist import __version__
from onellm_dist.model.configuration import OneLLMConfig

CARD = "README.md"
_LLAMA_2 = (4096, 11008, 32000)
"""Width, FFN and vocabulary of LLaMA-2 7B."""


def build_card(
    config: OneLLMConfig,
    parameters: Mapping[str, int],
    dtype: torch.dtype,
    origin: str,
    notes: Mapping[str, Any],
) -> str:
    """The text of README.md.

    Args:
        config: the model's config.
        parameters: part (the first component of a name) -> number of parameters.
        dtype: dtype of most weights.
        origin: what the model was made from, completing "Written by onellm_dist VERSION".
        notes: steps, stage and the like.
    """
    text = config.text_config
    lines = [
        "---",
        f"license: {'llama2' if needs_llama_licence(config) else 'other'}",
        "library_name: transformers",
        "pipeline_tag: any-to-any",
        "tags: [onellm, multimodal, " + ", ".join(config.modalities) + "]",
        "---",
        "",
        "# OneLLM: " + ", ".join(config.modalities) + " into one language model",
        "",
        f"Written by onellm_dist {__version__} {origin}. After OneLLM (arXiv 2312.03700).",
        "",
        "| part | parameters |",
        "|---|---|",
        *(f"| {part} | {count:,} |" for part, count in parameters.items()),
        "",
        f"LLM: {text.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}. "
        f"UPM: {config.upm.experts} experts of {config.upm.blocks} blocks, {config.upm.router} "
        f"router. Weights: {dtype}.",
        "",
        *_describe_training(notes),
        *_describe_use(config),
        "## Licences",
        "",
        *_list_licences(config),
        "",
    ]
    return "\n".join(lines)


def _describe_training(notes: Mapping[str, Any]) -> list[str]:
    if not notes:
        return []
    return [
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in notes.items() if value is not None),
        "",
    ]


def _describe_use(config: OneLLMConfig) -> list[str]:
    medium = f', {config.modalities[0]}="FILE"' if config.modalities else ""
    return [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForMultimodalLM, AutoProcessor",
        "",
        "# Without onellm_dist, the model runs the code in its own folder.",
        'options = {"trust_remote_code": True}',
        'model = AutoModelForMultimodalLM.from_pretrained("THIS_DIRECTORY", **options)',
        'processor = AutoProcessor.from_pretrained("THIS_DIRECTORY", **options)',
        f'inputs = processor(text="Describe the input."{medium})',
        "print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64)))",
        "```",
        "",
    ]


def needs_llama_licence(config: OneLLMConfig) -> bool:
    """Whether the LLM has the shape of LLaMA-2 7B, whose licence goes with its weights.

    Args:
        config: the model's config.
    """
    text = config.text_config
    return (
        text.model_type == "llama"
        and (text.hidden_size, text.intermediate_size, text.vocab_size) == _LLAMA_2
    )


def _list_licences(config: OneLLMConfig) -> list[str]:
    llm = (
        "The LLM has the shape of LLaMA-2 7B. If its weights are Meta's, the LLaMA 2 Community "
        "License holds: pass its text and Notice file on with the model."
        if needs_llama_licence(config)
        else "The LLM's weights keep the licence of the model that they came from."
    )
    return [
        f"- {llm}",
        "- The encoder's weights keep the licence of the CLIP that they came from (OpenAI's: MIT).",
        "- Datasets have terms of their own, and some forbid commercial use of what is trained on "
        "them: LAION-400M and LAION-COCO (CC BY 4.0 for the metadata; the images are their "
        "owners'), WebVid (research), WavCaps (academic), Cap3D/Objaverse (by object), CC3M "
        "(Google's terms), Ego4D (signed licence), NSD (signed terms). Name here the datasets "
        "that were used.",
    ]
