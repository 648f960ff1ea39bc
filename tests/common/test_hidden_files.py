"""The one rule of hidden files."""

from __future__ import annotations

import pytest

from onellm_dist.common.hidden_files import has_hidden_part, is_hidden


@pytest.mark.parametrize(
    "name",
    ["._cat.jpg", ".DS_Store", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "Thumbs.db", ".a.tar"],
)
def test_hidden(name: str) -> None:
    assert is_hidden(name)
    assert has_hidden_part(f"train/{name}/x.jpg")
    assert has_hidden_part(name)


@pytest.mark.parametrize("name", ["cat.jpg", "_cat.jpg", "__cat__", "a.b", "MACOSX", "@me"])
def test_not_hidden(name: str) -> None:
    assert not is_hidden(name)
    assert not has_hidden_part(f"./train/../{name}")
