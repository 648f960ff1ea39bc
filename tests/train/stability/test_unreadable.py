"""Steps that teach nothing, and modalities of which no sample can be read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from one_rank import ONE_RANK

from onellm_dist.common.errors import OneLLMError
from onellm_dist.train.stability.unreadable import UnreadableSamples, check_supervision
from onellm_dist.train.totals import StepValues


def plan(supervised: int = 9, **samples: int) -> Any:
    """A step with this many samples of each modality (`image_audio`: of both)."""
    combinations = {tuple(k.split("_")) if k != "text" else (): v for k, v in samples.items()}
    totals = SimpleNamespace(
        samples=sum(samples.values()),
        supervised_tokens=supervised,
        samples_by_combination=combinations,
    )
    return SimpleNamespace(step=3, totals=totals)


def values(new: int = 0, *, learned: bool = True, **unreadable: int) -> StepValues:
    return make_values(new, unreadable, learned=learned)


def make_values(new: int, unreadable: dict[str, int], *, learned: bool = True) -> StepValues:
    nll = {"text": 1.0} if learned else {}
    return StepValues(1.0, nll, 0, new, unreadable=unreadable)


def reasons(count: int, text: str = "unreadable audio: no decoder") -> dict[str, str]:
    return {f"d/s/{i}@0": f"d/s/{i}@0: {text}" for i in range(count)}


def test_a_modality_of_which_every_sample_fails_stops_the_run_and_names_the_library() -> None:
    samples = UnreadableSamples(3)
    samples.check(plan(image=6, audio=4), values(4, audio=4), reasons(4), ONE_RANK)
    with pytest.raises(OneLLMError, match=r"modality audio.*fail alike: unread") as caught:
        samples.check(plan(image=6, audio=4), values(4, audio=4), reasons(4), ONE_RANK)
    assert "a library" in str(caught.value) and "data.max_skipped" not in str(caught.value)


@pytest.mark.parametrize("failed", [7, 1])
def test_one_sample_that_was_read_acquits_the_library_for_good(failed: int) -> None:
    samples = UnreadableSamples(3)
    for _ in range(9):
        own = reasons(failed)
        samples.check(plan(audio=8), values(failed, audio=failed), own, ONE_RANK)
    samples.check(plan(audio=8), values(8, audio=8), reasons(8), ONE_RANK)


@pytest.mark.parametrize("kind", ["text", "image_audio"])
def test_texts_and_combinations_count_too(kind: str) -> None:
    unreadable = dict.fromkeys(["text"] if kind == "text" else ["image", "audio"], 8)
    with pytest.raises(OneLLMError, match=kind.split("_", maxsplit=1)[0]):
        UnreadableSamples(3).check(
            plan(**{kind: 8, "imu": 3}), make_values(8, unreadable), reasons(8), ONE_RANK
        )


def test_a_step_of_which_nothing_could_be_read_is_an_error() -> None:
    samples = UnreadableSamples(3)
    with pytest.raises(OneLLMError, match="step 3: none of its 4 samples could be read: unread"):
        samples.check(plan(audio=4), values(4, learned=False, audio=4), reasons(4), ONE_RANK)


def test_samples_that_are_known_to_be_left_out_may_fill_a_step_but_not_a_run() -> None:
    samples = UnreadableSamples(3)
    for learned in (False, False, True, False, False):
        samples.check(plan(audio=4), values(learned=learned), {}, ONE_RANK)
    with pytest.raises(OneLLMError, match="every sample of the last 3 steps, up to step 3"):
        samples.check(plan(audio=4), values(learned=False), {}, ONE_RANK)


def test_a_loss_that_is_not_finite_is_no_empty_step() -> None:
    broken, samples = StepValues(float("nan"), {}, 1, 0), UnreadableSamples(3)
    for _ in range(9):
        samples.check(plan(audio=4), broken, {}, ONE_RANK)


def test_a_step_without_a_supervised_token_is_an_error() -> None:
    check_supervision(plan(supervised=1, text=2), 96)
    with pytest.raises(OneLLMError, match="none of its 2 samples has a supervised token") as caught:
        check_supervision(plan(supervised=0, text=2), 96)
    assert "data.max_text_tokens=96" in str(caught.value) and caught.value.exit_code == 1
