"""A file that is not a medium is called what it is, by every decoder without error numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from media_samples import photo, picture, video

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality

OTHERS = {
    "empty": b"",
    "made of zeros": bytes(5000),
    "an HTML page": b"\n<!DOCTYPE html><html>404</html>",
    "an SVG drawing": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "an XML text": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a JSON text": b'{"error": "gated"}',
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "a PDF": b"%PDF-1.7 ...",
    "a HEIC picture": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "compressed with gzip": b"\x1f\x8b\x08" + bytes(range(100)),
    "a zip archive": b"PK\x03\x04" + bytes(range(100)),
    "an icon": picture(photo(32, 32), "ICO").data,
}


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_is_called_what_it_is(kind: str, modality: str) -> None:
    part = Part({"image": "jpg", "video": "mp4", "audio": "mp3"}[modality], OTHERS[kind])
    with pytest.raises(SampleError) as error:
        get_modality(modality).read_raw({modality: part}, {})
    assert f"it is {kind}" in error.value.what
    assert "Errno" not in error.value.what and "<none>" not in error.value.what


def test_a_film_that_was_cut_before_its_table_is_called_so() -> None:
    whole = video()
    for data in (whole[: whole.index(b"moov") - 8], whole[: len(whole) // 3]):
        with pytest.raises(SampleError, match=r"table of contents \(moov\) is missing"):
            get_modality("video").read_raw({"video": Part("mp4", data)}, {})


def test_sounds_in_other_containers_name_those_that_are_read() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(16000), 16000, format="VOC", subtype="PCM_16")
    with pytest.raises(SampleError, match="none of the containers that are read") as error:
        get_modality("audio").read_raw({"audio": Part("wav", buffer.getvalue())}, {})
    assert "Errno" not in error.value.what


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF"])
def test_a_damaged_picture_is_not_said_to_be_another_kind_of_file(form: str) -> None:
    part = picture(photo(32, 32), form)
    with pytest.raises(SampleError, match=r"it begins like a .* picture, and what follows is dam"):
        get_modality("image").read_raw({"image": Part("jpg", part.data[:7] + bytes(50))}, {})
