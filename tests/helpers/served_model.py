"""A small model behind a real server on a port of this machine, in a thread of the test."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import soundfile
import torch
import uvicorn
from media_samples import video
from packs import small_model
from PIL import Image

from onellm_dist.model.adapters.adapter_set import AdapterSet
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.serving.generate import DecodingOptions, build_prompt, generate
from onellm_dist.serving.media import read_given_files
from onellm_dist.serving.server.media import to_files
from onellm_dist.serving.server.run import assemble, listen, make_config
from onellm_dist.serving.server.settings import ServerSettings


def make_model(seed: int = 3) -> Any:
    """A model whose answers depend on its media."""
    model: Any = small_model(seed=seed, words=len(load_toy_tokenizer()))
    with torch.no_grad():
        # Random weights would hardly look at media: spans are made as loud as words.
        for projector in model.projectors.values():
            for weight in projector.out_proj.parameters():
                weight.mul_(20)
    return model.eval()


@contextmanager
def serve(
    model: Any, *, warm_up: bool = False, adapters: AdapterSet | None = None, **settings: Any
) -> Iterator[str]:
    """Run a server; yields its address."""
    settings |= {"adapters": tuple(adapters.names) if adapters else ()}
    chosen = ServerSettings(**{"name": "toy", "port": 0, "readers": 1, **settings})
    app = assemble(model, load_toy_tokenizer(), chosen, warm_up=warm_up, adapters=adapters)
    listening = listen(chosen.host, chosen.port)
    server = uvicorn.Server(make_config(app, chosen))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def make_picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_array(shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, (np.random.default_rng(seed).random(shape) * scale).astype(np.float32))
    return buffer.getvalue()


def make_sound(hertz: float) -> bytes:
    buffer = io.BytesIO()
    wave = np.sin(np.arange(16000) * hertz * 2 * np.pi / 16000).astype(np.float32)
    soundfile.write(buffer, wave * 0.5, 16000, format="WAV")
    return buffer.getvalue()


def make_film() -> bytes:
    return video(frames=30, size=(96, 64))


def make_files() -> dict[str, Any]:
    """A medium of every modality: the bytes of its file, or of each of its files."""
    return {
        "image": make_picture(0),
        "video": make_film(),
        "audio": make_sound(440),
        "point": make_array((500, 6)),
        "depth": {"depth": make_picture(1), "image": make_picture(2)},
        "normal": {"normal": make_picture(3), "image": make_picture(4)},
        "imu": make_array((6, 400)),
        "fmri": make_array((15724,)),
    }


def make_part(modality: str, files: Any) -> dict[str, Any]:
    """The content part of a medium: OpenAI's where it has one."""
    if isinstance(files, dict):
        parts = {role: encode(data) for role, data in files.items()}
        return {"type": "onellm", "modality": modality, "parts": parts}
    if modality == "audio":
        return {"type": "input_audio", "input_audio": {"data": encode(files), "format": "wav"}}
    if modality in ("image", "video"):
        url = f"data:application/octet-stream;base64,{encode(files)}"
        return {"type": f"{modality}_url", f"{modality}_url": {"url": url}}
    return {"type": "onellm", "modality": modality, "data": encode(files)}


def make_messages(question: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def make_body(question: str, *parts: dict[str, Any], **options: Any) -> bytes:
    content = {"model": "toy", "messages": make_messages(question, *parts), **options}
    return json.dumps(content).encode()


def read_values(media: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Modality to [1, *value_shape]."""
    found = read_given_files([to_files(name, files) for name, files in media.items()])
    return dict(zip(media, found, strict=True))


def compute_answer(model: Any, question: str, media: dict[str, Any], tokens: int = 12) -> str:
    """What `onellm generate` answers."""
    return generate(
        model,
        load_toy_tokenizer(),
        build_prompt(question, "conversation"),
        read_values(media),
        decoding=DecodingOptions(max_new_tokens=tokens),
    ).text


def compute_placed(model: Any, text: str, pictures: list[bytes], tokens: int = 12) -> str:
    """What `onellm generate` answers to a text with a placeholder for each picture."""
    values = read_given_files([to_files("image", picture) for picture in pictures])
    return generate(
        model,
        load_toy_tokenizer(),
        text,
        [("image", value) for value in values],
        decoding=DecodingOptions(max_new_tokens=tokens),
    ).text
