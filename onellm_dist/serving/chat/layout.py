"""The page of the chat: its widgets, without what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from onellm_dist.modalities import get_modality
from onellm_dist.serving.chat.examples import list_examples
from onellm_dist.serving.server.settings import ServerSettings

CSS = """
#conversation { height: 60vh; min-height: 320px }
#status { min-height: 1.5em }
#seen img { image-rendering: auto; object-fit: contain }
#seen .grid-wrap { padding-top: 32px; min-height: 0 }
#seen .thumbnail-item { aspect-ratio: auto; height: auto }
.chosen .icon-wrap, #conversation button[aria-label="Share"] { display: none }
footer { display: none !important }
@media (max-width: 700px) {
  #conversation { height: 50vh }
  #actions { display: grid; grid-template-columns: 1fr 1fr }
  .gradio-container { padding: 8px }
}
"""
"""Narrow screens have one column; Gradio itself follows the browser's light or dark scheme. Its
button to share a picture would send it to another machine."""
KEYS = """() => document.addEventListener("keydown", () => {
  document.querySelectorAll("#modality input").forEach(each => { each.name = "modality" })
}, true)"""
"""Arrow keys move between radio buttons of one name; Gradio gives each one of its own, and again at
each change."""

_NAMED = 4
"""Extensions that are named above a field for a file; the bytes decide, not these."""


@dataclass(frozen=True)
class ChatWidgets:
    """The widgets of the page."""

    conversation: Any
    status: Any
    question: Any
    send: Any
    stop: Any
    again: Any
    clear: Any
    modality: Any
    files: list[Any]
    attach: Any
    detach: Any
    seen: Any
    prompt: Any
    options: list[Any]
    """In the order of the fields of `desk.ChatOptions`."""
    examples: dict[str, Any]
    """Modality -> its button."""


def list_file_parts(modality: str) -> list[tuple[str, bool]]:
    """The files that a medium is read from: (part, whether it is required)."""
    known = get_modality(modality)
    return [(part, True) for part in known.required_parts] + [
        (part, False) for part in known.optional_parts
    ]


def describe_file(modality: str, number: int) -> dict[str, Any]:
    """Properties of one of the fields for files while a modality is chosen.

    Args:
        modality: the modality.
        number: which field.
    """
    parts = list_file_parts(modality)
    if number >= len(parts):
        return {"visible": False, "value": None}
    part, required = parts[number]
    known = get_modality(modality)
    names = {**known.required_parts, **known.optional_parts}[part]
    kinds = ", ".join(f".{name}" for name in names[:_NAMED]) + ", …" * (len(names) > _NAMED)
    label = f"{part} ({kinds})" if required else f"{part}, optional ({kinds})"
    return {"visible": True, "value": None, "label": label}


def build_widgets(
    title: str, modalities: Sequence[str], settings: ServerSettings, prompt_format: str
) -> ChatWidgets:
    """Build the widgets, inside a `gr.Blocks`.

    Args:
        title: the model's name.
        modalities: what it reads.
        settings: the server's.
        prompt_format: how messages become text.
    """
    gr.Markdown(f"# {title}")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            left = _build_conversation()
        with gr.Column(scale=2, min_width=320):
            right = _build_media(modalities)
            with gr.Accordion("Decoding", open=False):
                options = _build_options(settings, prompt_format)
            with gr.Accordion("Prompt as sent", open=False):
                prompt = gr.Textbox(
                    label="What the model continued", interactive=False, lines=4, max_lines=16
                )
            examples = _build_examples(modalities)
    return ChatWidgets(**left, **right, options=options, prompt=prompt, examples=examples)


def _build_conversation() -> dict[str, Any]:
    conversation = gr.Chatbot(
        label="Conversation",
        elem_id="conversation",
        render_markdown=False,  # what was said, as it was said
        placeholder="Attach a medium, write a question, press Enter.",
        group_consecutive_messages=True,
        buttons=["copy", "copy_all"],
    )
    status = gr.HTML(elem_id="status")
    question = gr.Textbox(
        label="Question",
        placeholder="Enter sends, Shift+Enter breaks the line",
        lines=1,
        max_lines=8,
        autofocus=True,
        elem_id="question",
    )
    with gr.Row(elem_id="actions"):
        send = gr.Button("Send", variant="primary", min_width=80, elem_id="send")
        stop = gr.Button("Stop", variant="stop", min_width=80, interactive=False, elem_id="stop")
        again = gr.Button("Try again", min_width=80, elem_id="again")
        clear = gr.Button("New", min_width=80, elem_id="clear")
    return {
        "conversation": conversation,
        "status": status,
        "question": question,
        "send": send,
        "stop": stop,
        "again": again,
        "clear": clear,
    }


def _build_media(modalities: Sequence[str]) -> dict[str, Any]:
    modality = gr.Radio(list(modalities), value=modalities[0], label="Medium", elem_id="modality")
    most = max(len(list_file_parts(name)) for name in modalities)
    files = [
        gr.File(
            file_count="single",
            type="filepath",
            height=160,
            elem_id=f"file-{number}",
            elem_classes="chosen",
            **describe_file(modalities[0], number),
        )
        for number in range(most)
    ]
    with gr.Row():
        attach = gr.Button("Attach", min_width=80, elem_id="attach")
        detach = gr.Button("Detach", min_width=80, elem_id="detach")
    seen = gr.Gallery(
        label="What the model sees",
        columns=2,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="seen",
    )
    return {
        "modality": modality,
        "files": files,
        "attach": attach,
        "detach": detach,
        "seen": seen,
    }


def _build_options(settings: ServerSettings, prompt_format: str) -> list[Any]:
    most = settings.max_new_tokens
    return [
        gr.Textbox(label="System message", lines=2, visible=prompt_format != "raw"),
        gr.Slider(1, most, min(128, most), step=1, label="Longest answer, in tokens"),
        gr.Slider(
            0, 2, min(settings.temperature, 2), step=0.05, label="Temperature (0: the likeliest)"
        ),
        gr.Slider(0.05, 1, 1, step=0.05, label="Nucleus (top p)"),
        gr.Number(label="Seed (empty: another each time)", precision=0, value=None, minimum=0),
        gr.Textbox(label="Strings that end the answer, one a line", lines=1, max_lines=4),
    ]


def _build_examples(modalities: Sequence[str]) -> dict[str, Any]:
    names = list_examples(modalities)
    if not names:
        return {}
    with gr.Accordion("Examples (from the toy world)", open=True), gr.Row():
        return {
            name: gr.Button(name, size="sm", min_width=70, elem_id=f"example-{name}")
            for name in names
        }
