"""Files of a question whose decoder hangs, crashes or eats memory end in words."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.common.workers.samples import SampleLimits
from onellm_dist.modalities import get_modality
from onellm_dist.serving.media import read_files


def spin() -> None:
    while True:
        pass


def crash() -> None:
    faulthandler.disable()  # pytest's; the crash is meant
    os.kill(os.getpid(), signal.SIGSEGV)


def eat() -> None:
    chunks = []
    while True:
        chunks.append(bytearray(os.urandom(1 << 20)) * 64)


@pytest.mark.parametrize(
    ("fault", "seconds", "words"),
    [
        (spin, 0.5, "took more than 0.5 s"),
        (lambda: time.sleep(60), 0.5, "took more than 0.5 s"),
        (crash, 60.0, "crashed (SIGSEGV)"),
        (eat, 60.0, "needed more than 200 MiB"),
    ],
    ids=["spins", "sleeps", "crashes", "eats"],
)
@pytest.mark.seconds
def test_a_file_that_harms_its_decoder_ends_in_words(
    fault: Callable[[], None],
    seconds: float,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, good = tmp_path / "bad.png", tmp_path / "good.png"
    Image.new("RGB", (8, 8)).save(path)
    Image.new("RGB", (8, 8)).save(good)
    modality = type(get_modality("image"))
    read_value = modality.read_value

    def planted(self: Any, *args: Any, **options: Any) -> Any:
        fault()
        return read_value(self, *args, **options)

    monkeypatch.setattr(modality, "read_value", planted)
    with pytest.raises(SampleError) as error:
        read_files([("image", path)], SampleLimits(seconds=seconds, megabytes=200))
    assert str(path) in error.value.what and words in error.value.what
    monkeypatch.undo()
    assert read_files([("image", good)])["image"].shape[0] == 1
