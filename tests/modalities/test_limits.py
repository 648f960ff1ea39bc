"""The table of limits: what is refused, in words, and that every modality has its row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.modalities.limits import (
    LIMITS,
    Limits,
    check_count,
    check_duration,
    check_input,
    check_rate,
    check_size,
)


def test_every_modality_of_the_package_has_its_row() -> None:
    found = {m.name: m.limits for m in all_modalities().values()}
    assert found == LIMITS
    assert all(math.isfinite(limits.magnitude) for limits in found.values())


@pytest.mark.parametrize("size", [(0, 5), (100_000_000, 1), (1, 20_001), (20_000, 20_000)])
def test_sizes_outside_the_limits_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(SampleError, match=r"\.png") as error:
        check_size(LIMITS["image"], *size, ".png")
    assert error.value.why and error.value.do
    check_size(LIMITS["image"], 12_000, 9_000, ".png")


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0, 1e30])
def test_rates_and_durations_outside_the_limits_are_refused(number: float) -> None:
    with pytest.raises(SampleError, match="rate"):
        check_rate(LIMITS["audio"], number, ".wav")
    with pytest.raises(SampleError, match="lasts"):
        check_duration(LIMITS["video"], number, ".mp4")


def test_counts_outside_the_limits_are_refused() -> None:
    for what, count in (("points", 0), ("points", 10**12), ("values", 10**12)):
        with pytest.raises(SampleError, match=what):
            check_count(LIMITS["point"], what, count, ".ply")
    check_count(LIMITS["point"], "points", 8192, ".ply")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.5, -1e30])
@pytest.mark.parametrize("place", [0, 77, -1])
def test_an_implausible_model_input_is_refused_wherever_it_stands(bad: float, place: int) -> None:
    value = torch.zeros(3, 5, 8)
    value.view(-1)[place] = bad
    with pytest.raises(SampleError, match="would give the model"):
        check_input(LIMITS["image"], value, "image")


def test_without_limits_a_model_input_must_be_finite_all_the_same() -> None:
    check_input(Limits(), torch.full((4,), 1e30), "thermal")
    with pytest.raises(SampleError):
        check_input(Limits(), torch.tensor([0.0, math.nan]), "thermal")


def test_a_transform_that_makes_nan_makes_no_value() -> None:
    fmri = get_modality("fmri")
    raw = np.zeros(15724, np.float32)
    assert fmri.make_value(raw, train=False, rng=np.random.default_rng(0)).shape == (1, 15724)
    raw[9] = np.nan
    with pytest.raises(SampleError, match="fmri"):
        fmri.make_value(raw, train=False, rng=np.random.default_rng(0))
