"""Samples with any number of media in loader workers: what is read never depends on them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from data_worlds import open_plan, write
from media_worlds import write_media, write_wide

from onellm_dist.data.loader import Loader
from onellm_dist.data.plan import Plan
from onellm_dist.packed import PackedBatch
from onellm_dist.shards.tools.index_existing import index_existing_shards

MIXTURE = {"many": 3.0, "wide": 1.0, "pic": 1.0}
STEPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Placed media, pictures of several spans, and one picture a sample."""
    root = tmp_path_factory.mktemp("loader")
    write_media(root, "many", 30)
    write_wide(root, "wide", [(200, 200), (448, 224), (500, 500)] * 2)
    write(root, "pic", ["image"], 9)
    for name in ("wide", "pic"):
        index_existing_shards(root / name, media=True)
    return root


def open_here(root: Path, **keys: Any) -> Plan:
    fixed: dict[str, Any] = {"pack_llm_tokens": 640, "pack_encoder_tokens": 8192}
    return open_plan(
        root,
        MIXTURE,
        text_format="caption",
        global_batch=10,
        spans={"image": 5},
        **{**fixed, **keys},
    )


def digest(batch: PackedBatch) -> str:
    """SHA-256 of everything that the model gets."""
    found = hashlib.sha256()
    for name, value in sorted(batch.values.items()):
        found.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    for tensor in (batch.input_ids, batch.labels, batch.weights):
        found.update(tensor.numpy().tobytes())
    rest = (batch.text_token_counts, batch.modalities, batch.places, batch.span_numbers)
    found.update(repr((rest, batch.sample_ids, sorted(batch.skipped_samples))).encode())
    return found.hexdigest()


def test_placed_media_are_the_same_with_0_1_and_3_workers(root: Path) -> None:
    expected: dict[int, list[tuple[int, int, str]]] = {}
    seen: set[str] = set()
    for workers in (0, 1, 3):
        plan = open_here(root, workers=workers)
        for rank in range(2):
            with Loader(plan, 2, rank, 0, STEPS, workers) as loader:
                batches = list(loader)
            found = [(micro.step, micro.index, digest(batch)) for micro, batch in batches]
            assert expected.setdefault(rank, found) == found, (workers, rank)
            for _, batch in batches:
                seen.update(
                    kind
                    for kind, there in (
                        ("places", batch.places),
                        ("several media", any(len(set(m)) < len(m) for m in batch.modalities)),
                        ("several spans", batch.span_numbers),
                        ("no medium", () in batch.modalities),
                    )
                    if there
                )
                assert not batch.skipped_samples
    assert seen == {"places", "several media", "several spans", "no medium"}
    assert len({line for found in expected.values() for line in found}) > STEPS


def test_a_loader_of_placed_media_goes_on_where_another_was_killed(root: Path) -> None:
    """From any step, with another number of workers."""
    whole = {}
    with Loader(open_here(root), 1, 0, 0, STEPS, 0) as loader:
        for micro, batch in loader:
            whole[micro.step, micro.index] = digest(batch)
    for first, workers in ((1, 3), (3, 1)):
        with Loader(open_here(root), 1, 0, first, STEPS, workers) as loader:
            found = {(m.step, m.index): digest(b) for m, b in loader}
        assert found == {place: d for place, d in whole.items() if place[0] >= first}
