"""Media as lmms-eval gives them; lmms-eval itself is not needed for reading them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.evaluation.lmms.media import read_media_of_prompt, read_medium
from onellm_dist.modalities import get_modality
from onellm_dist.modalities.files import read_file_spans


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is cut into two tiles beside its overview."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.effect_noise((448, 224), 80).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("most", [1, 3])
def test_a_picture_takes_as_many_spans_as_in_training(picture: Path, most: int) -> None:
    wanted, _ = read_file_spans(get_modality("image"), picture, most)
    assert len(wanted) == most
    for given in (str(picture), picture, Image.open(picture)):
        found = list(read_medium("image", given, most))
        values = [medium.value for medium in found if isinstance(medium.value, torch.Tensor)]
        assert torch.equal(torch.stack(values), wanted)
        assert [medium.number for medium in found] == list(range(most))
        assert len({medium.identity for medium in found}) == most
    assert len(list(read_medium("image", picture))) == 1


def test_media_of_a_modality_share_its_spans(picture: Path) -> None:
    def count(pictures: int, most: dict[str, int]) -> int:
        return len(read_media_of_prompt([("image", picture)] * pictures, most))

    assert [count(1, {}), count(1, {"image": 3}), count(2, {"image": 3})] == [1, 3, 2]
    assert [count(2, {"image": 6}), count(1, {"video": 3})] == [6, 1]


def test_a_medium_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"none\.png"):
        list(read_medium("image", tmp_path / "none.png"))
