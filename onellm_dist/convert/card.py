"""The model card (README.md) of a onellm directory: what it is, where it came from, whose licences hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from onellm_dist import __version__
from onellm_dist.convert.checkpoint import Opened
from onellm_dist.model.configuration import OneLLMConfig

CARD = "README.md"
_LLAMA_2 = (4096, 11008, 32000)
"""Width, FFN and vocabulary of LLaMA-2 7B."""


def parameters_by_part(opened: Opened) -> dict[str, int]:
    """Parameters of each part of a model, by the first component of their names."""
    counts: Counter[str] = Counter()
    for name, tensor in opened.tensors.items():
        counts[name.split(".", 1)[0] if opened.kind == "onellm" else opened.kind] += tensor.numel
    return dict(counts)


def write_card(folder: Path, opened: Opened) -> None:
    """Write README.md into `folder`."""
    config: OneLLMConfig = opened.config
    lines = [
        "---",
        f"license: {'llama2' if _is_llama_2(config) else 'other'}",
        "library_name: transformers",
        "pipeline_tag: any-to-any",
        "tags: [onellm, multimodal, " + ", ".join(config.modalities) + "]",
        "---",
        "",
        "# OneLLM: " + ", ".join(config.modalities) + " into one language model",
        "",
        f"Written by onellm_dist {__version__} from a checkpoint of the format `{opened.format}`. After OneLLM (arXiv 2312.03700).",
        "",
        "| part | parameters |",
        "|---|---|",
        *(f"| {part} | {count:,} |" for part, count in parameters_by_part(opened).items()),
        "",
        f"LLM: {config.text_config.model_type}, {config.text_config.num_hidden_layers} layers of width {config.text_config.hidden_size}. "
        f"UPM: {config.upm.experts} experts of {config.upm.blocks} blocks, {config.upm.router} router. Weights: {opened.dtype}.",
        "",
        *_training(opened),
        "## Use",
        "",
        "```python",
        "from onellm_dist.model import load_model",
        'model, processor = load_model(path="THIS_DIRECTORY", preset=None, seed=0)',
        'inputs = processor(text="Describe the input.", ' + f'{config.modalities[0]}="FILE")'
        if config.modalities
        else "",
        "print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64)))",
        "```",
        "",
        "## Licences",
        "",
        *_licences(config),
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _training(opened: Opened) -> list[str]:
    notes = dict(opened.notes)
    if opened.made:
        notes["random parts"] = f"{len(opened.made)} tensors are initialised and not trained yet"
    return (
        ["## Training", "", *(f"- {key}: {value}" for key, value in notes.items()), ""]
        if notes
        else []
    )


def _is_llama_2(config: OneLLMConfig) -> bool:
    text = config.text_config
    return (
        text.model_type == "llama"
        and (text.hidden_size, text.intermediate_size, text.vocab_size) == _LLAMA_2
    )


def _licences(config: OneLLMConfig) -> list[str]:
    llm = (
        "The LLM has the shape of LLaMA-2 7B. If its weights are Meta's: LLaMA 2 Community License; "
        "pass its text and notice on with the model."
        if _is_llama_2(config)
        else "The LLM's weights keep the licence of the model that they came from."
    )
    return [
        f"- {llm}",
        "- The encoder's weights keep the licence of the CLIP that they came from (OpenAI's: MIT).",
        "- Datasets have terms of their own, and some forbid commercial use of what is trained on them: LAION-400M and LAION-COCO",
        "  (CC BY 4.0 for the metadata; the images are their owners'), WebVid (research), WavCaps (academic), Cap3D/Objaverse (by object),",
        "  CC3M (Google's terms), Ego4D (signed licence), NSD (signed terms). Name here those that were used.",
    ]
