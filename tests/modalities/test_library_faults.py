"""A library that is too old or half installed ends a run in words: it makes no bad samples."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from media_samples import photo, picture
from PIL import Image, features
from test_all_modalities import NAMES, good

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.data.medium_reader import translate_errors
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.files import read_file_value
from onellm_dist.modalities.library_faults import require_library
from onellm_dist.shards.build.prepare import prepare_sample
from onellm_dist.shards.build.settings import OPTIONS, BuildSettings
from onellm_dist.shards.sources.base import RawSample

_SETTINGS = BuildSettings(
    **{**{name: option.default for name, option in OPTIONS.items()}, "name": "n", "licence": ""}
)
_USED: dict[str, tuple[Any, str]] = {
    "image": (Image, "open"),
    "depth": (Image, "open"),
    "normal": (Image, "open"),
    "video": (av, "open"),
    "audio": (soundfile, "SoundFile"),
    "point": (np, "frombuffer"),
    "imu": (np, "frombuffer"),
    "fmri": (np, "frombuffer"),
}
"""What the decoder of each modality calls first."""


def older() -> None:
    """What a library has that does not know the arguments yet."""


def store(folder: Path, parts: dict[str, Part]) -> dict[str, Path]:
    files = {part.extension: folder / f"x.{part.extension}" for part in parts.values()}
    for part in parts.values():
        files[part.extension].write_bytes(part.data)
    return files


def named(modality: str) -> dict[str, Part]:
    """Parts under the names that they have on disk."""
    parts = dict(good(modality))
    if modality in ("depth", "normal"):
        parts[modality] = Part(f"{modality}.png", parts[modality].data)
    return parts


@pytest.mark.parametrize("modality", NAMES)
@pytest.mark.parametrize("fault", ["lacks it", "takes other arguments", "cannot be imported"])
def test_a_library_that_does_not_fit_ends_every_door_in_words(
    modality: str, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = named(modality)
    files = store(tmp_path, parts)
    library, name = _USED[modality]

    def fail(*_: Any, **__: Any) -> Any:
        raise ImportError("no libx.so", name=library.__name__)

    if fault == "lacks it":
        monkeypatch.delattr(library, name)
    else:
        monkeypatch.setattr(library, name, fail if fault == "cannot be imported" else older)

    def train() -> None:
        with translate_errors(get_modality(modality), "set/shard/x@0"):
            get_modality(modality).decode(parts, {})

    raw = RawSample("x", "x", files, "a caption")
    path = files[parts[modality].extension]
    for door in (
        lambda: prepare_sample(raw, (modality,), _SETTINGS),
        train,
        lambda: get_modality(modality).read_raw(parts, {}),
        lambda: read_file_value(get_modality(modality), path),
    ):
        with pytest.raises(OneLLMError, match=r"^(the|an) installed .* does not fit: ") as error:
            door()
        assert not isinstance(error.value, SampleError)
        assert "onellm doctor" in error.value.do
        if fault != "takes other arguments":
            assert f"installed {library.__name__.partition('.')[0]} " in error.value.what


@pytest.mark.parametrize(
    ("form", "codec"),
    [
        ("JPEG", "jpg"),
        ("PNG", "zlib"),
        ("WEBP", "webp"),
        ("TIFF", "libtiff"),
        ("AVIF", "avif"),
        ("JPEG2000", "jpg_2000"),
    ],
)
def test_a_pillow_without_a_codec_is_no_fault_of_its_pictures(
    form: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = picture(photo(), form)
    check = features.check

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("decoder not available")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(SampleError):  # the codec is there: the bytes are bad
        get_modality("image").read_raw({"image": part}, {})
    monkeypatch.setattr(features, "check", lambda name: name != codec and check(name))
    with pytest.raises(OneLLMError, match=f"cannot read {codec.upper()} pictures") as error:
        get_modality("image").read_raw({"image": part}, {})
    assert not isinstance(error.value, SampleError)


class _Broken:
    """A decoder in this file, as a library's own code is: broken bytes leave it half made."""

    def decode(self) -> Any:
        return self.layers  # type: ignore[attr-defined]


def test_what_a_library_says_of_broken_bytes_is_no_fault_of_the_library() -> None:
    """Pillow's own code asked its JPEG for `layer`, which a damaged header had not set."""
    for action in (
        lambda: _Broken().decode(),
        lambda: None.shape,  # type: ignore[attr-defined]
        lambda: (1).read,  # type: ignore[attr-defined]
        lambda: int("x"),
        lambda: io.BytesIO("text"),  # type: ignore[arg-type]
        lambda: dict[str, int]()["missing"],
    ):
        with pytest.raises(Exception, match=r".") as error:
            action()
        require_library(error.value)
