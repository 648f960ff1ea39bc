"""Sources of other packages: found through entry points, refused where their names collide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_worlds import contents, write_tree

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset, open_dataset
from onellm_dist.shards.build.registry import all_sources, get_source

MODULE = """
from onellm_dist.shards.sources.base import DatasetDescription, InputSplit, RawSample, Source


def plan(inputs, *, seed):
    return DatasetDescription((), [InputSplit("all", {"file": "words.txt"})])


def raw_samples(inputs, description):
    for number, word in enumerate((inputs / description["file"]).read_text().split()):
        yield RawSample(f"w{number}", f"words.txt, word {number}", caption=word)


SOURCE = Source("words", "one sample a word", plan=plan, raw_samples=raw_samples)
OTHER = Source("other-words", "the same", plan=plan, raw_samples=raw_samples)
TWIN = Source("folder", "a name that is taken", plan=plan, raw_samples=raw_samples)
"""


@pytest.fixture(autouse=True)
def _forget_sources() -> Iterator[None]:
    all_sources.cache_clear()
    yield
    all_sources.cache_clear()


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Install a package with entry points of the group of sources."""
    lines = [f"{name} = {value}" for name, value in points.items()]
    write_tree(
        tmp_path / "site",
        {
            "wordy_source.py": MODULE,
            "wordy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: wordy\nVersion: 1.0\n",
            "wordy-1.0.dist-info/entry_points.txt": "[onellm_dist.sources]\n" + "\n".join(lines),
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def test_a_source_of_another_package_is_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, words="wordy_source", other="wordy_source:OTHER")
    assert get_source("other-words").summary == "the same"
    write_tree(tmp_path / "in", {"words.txt": "one two three"})
    assert build_dataset("words", tmp_path / "in", tmp_path / "out").samples == 3
    texts = [parts["txt"] for parts in contents(open_dataset(tmp_path / "out")).values()]
    assert texts == [b"one", b"two", b"three"]


def test_a_name_that_is_taken_is_refused_with_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, twin="wordy_source:TWIN")
    with pytest.raises(UsageError) as caught:
        all_sources()
    assert "two sources have the name 'folder'" in str(caught.value)
    assert "onellm_dist.shards.sources.folder" in str(caught.value)
    assert "entry point twin of group onellm_dist.sources" in str(caught.value)


def test_an_entry_point_that_loads_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, plan="wordy_source:plan")
    with pytest.raises(UsageError, match=r"entry point plan of group .* which is not a source"):
        all_sources()


def test_an_unknown_source_is_answered_with_a_near_one() -> None:
    with pytest.raises(UsageError, match="unknown source 'folders'; did you mean 'folder'"):
        get_source("folders")
