"""The page of the chat in a real browser, in an environment of its own.

Gradio takes other versions of some packages than this project is pinned to, so that environment has
Gradio and playwright, and finds everything else in this one. ONELLM_CHAT_SHOTS names a folder where
the screenshots are kept, ONELLM_CHAT_ENVIRONMENT one where the environment is, or is made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import served_model as served
import torch
from pip_install import install

from onellm_dist.model import OneLLMProcessor
from onellm_dist.model.presets import load_toy_tokenizer

CHROMIUM = shutil.which("chromium")
ROOT = Path(__file__).parents[3]
PACKAGES = ("gradio>=6", "playwright>=1.50")
DRIVER = Path(__file__).with_name("chat_browser.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.soak,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with Gradio and playwright."""
    place = os.environ.get("ONELLM_CHAT_ENVIRONMENT")
    folder = Path(place) if place else tmp_path_factory.mktemp("chat") / "environment"
    found = folder / "bin" / "python"
    if not found.exists():
        venv.create(folder, with_pip=True)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (site / "parent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    if not subprocess.run([found, "-c", "import gradio, playwright"], check=False).returncode:
        return found
    install([str(found), "-m", "pip", "install", "--quiet", *PACKAGES])
    return found


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files that are sent, and of the screenshots."""
    kept = os.environ.get("ONELLM_CHAT_SHOTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("shots")
    endings = {"video": "mp4", "audio": "wav", "point": "npy", "imu": "npy", "fmri": "npy"}
    for name, content in served.make_files().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        parts = content if isinstance(content, dict) else {name: content}
        for part, data in parts.items():
            (folder / name / f"{part}.{endings.get(name, 'png')}").write_bytes(data)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def address(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a chat that answers one question at a time."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    model = served.make_model()
    tokenizer = load_toy_tokenizer()
    # Nothing that ends an answer is likely: answers last, and can be stopped.
    model.config.text_config.max_position_embeddings = 2048
    ends = [n for n in range(len(tokenizer)) if "#" in tokenizer.decode([n])]
    with torch.no_grad():
        model.llm.get_output_embeddings().weight[[*ends, tokenizer.eos_token_id]] = 0
    model.save_pretrained(folder)
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(folder)
    command = [
        *(str(python), "-m", "onellm_dist.cli", "chat", str(folder), "--port", "0"),
        *("--batch", "1", "--readers", "1", "--format", "conversation"),
        *("--max-new-tokens", "1000"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("chat with "))
            yield line.split(" on ")[1].strip()
            process.terminate()
            assert process.wait(30) == 0  # open pages do not keep it from ending
        finally:
            process.kill()


def test_the_page_in_a_browser(python: Path, shots: Path, address: str) -> None:
    done = subprocess.run(
        [python, DRIVER, address, shots, CHROMIUM or ""],
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" s\n") == 9, done.stdout
