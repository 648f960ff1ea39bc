"""Steps that teach nothing, and a modality of which no sample can be read.

One bad sample is the data's fault and is skipped. Where every sample of a modality fails, the data
is not the cause but a missing decoder, a library or the recipe, and skipping would hide it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.reasons import ALIKE, MIN_SAMPLES, normalise_reason
from onellm_dist.data.micro_batch import StepPlan
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.totals import StepValues

SHOWN = 3


class UnreadableSamples:
    """Counts the samples of each modality that this start has read, and that it could not.

    Args:
        max_empty_steps: steps in a row of which every sample may be left out.
    """

    def __init__(self, max_empty_steps: int) -> None:
        self._max_empty_steps = max_empty_steps
        self._empty_steps = 0
        self._tried: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    def check(
        self, plan: StepPlan, values: StepValues, own: Mapping[str, str], dist: Distributed
    ) -> None:
        """Check a step that is not applied yet. All ranks call it together.

        Args:
            plan: the plan of the step.
            values: its reduced values.
            own: sample id -> reason, of this rank's samples that could not be read.
            dist: the ranks.

        Raises:
            OneLLMError: nothing of the step, or of a modality, could be read; or too many steps in
                a row have no sample that is not left out.
        """
        failed = self.count(plan, values.unreadable)
        learned = bool(values.nll) or values.not_finite > 0
        self._empty_steps = 0 if learned else self._empty_steps + 1
        if learned and not failed:
            return
        reasons = [reason for part in dist.gather(list(own.values())) for reason in part]
        if failed:
            raise explain_failures(failed, reasons)
        if values.new_skipped_samples:
            raise explain_empty_step(plan, reasons)
        if self._empty_steps >= self._max_empty_steps:
            raise OneLLMError(
                f"every sample of the last {format_count(self._empty_steps, 'step')}, up to step "
                f"{plan.step}, is "
                "left out",
                "the run would learn nothing any more.",
                "see samples/ for the reasons, and data.exclude for what lists leave out.",
            )

    def count(self, plan: StepPlan, failed: Mapping[str, int]) -> list[str]:
        """Count a step; the same on every rank.

        Args:
            plan: the plan of the step.
            failed: modality -> samples that could not be read, over all ranks.

        Returns:
            The modalities of which no sample at all could be read.
        """
        for modalities, count in plan.totals.samples_by_combination.items():
            for name in modalities or ("text",):
                self._tried[name] += count
        self._failed.update(failed)
        return [
            name
            for name, count in self._failed.items()
            if count >= max(MIN_SAMPLES, self._tried[name])
        ]


def explain_failures(modalities: Iterable[str], reasons: Iterable[str]) -> OneLLMError:
    """The error of modalities of which no sample could be read.

    Args:
        modalities: their names.
        reasons: why, of samples of all ranks; `sample id: reason` each.
    """
    names = " and ".join(modalities)
    kinds = Counter(map(normalise_reason, reasons))
    total = sum(kinds.values())
    common = kinds.most_common(SHOWN)
    alike = bool(common) and common[0][1] >= ALIKE * total
    shown = common[0][0] if alike else "; ".join(kind for kind, _ in common)
    return OneLLMError(
        f"no sample of modality {names} could be read so far; "
        f"{'all fail alike' if alike else 'the commonest reasons'}: {shown}",
        "single bad samples do not fail like this: a library, the environment or the recipe is "
        "the cause, and skipping the samples would train without this modality.",
        "run `onellm doctor` and `onellm shards preview` on this machine, and compare the versions "
        "of the libraries with those of the machine that built the shards.",
    )


def check_supervision(plan: StepPlan, max_text_tokens: int) -> None:
    """Refuse a step without a supervised token.

    Raises:
        OneLLMError: by the token counts, none of its samples has one.
    """
    if plan.totals.supervised_tokens:
        return
    raise OneLLMError(
        f"step {plan.step}: none of its {format_count(plan.totals.samples, 'sample')} has a "
        f"supervised token",
        f"the step would teach nothing and its loss would be 0: their answers lie behind "
        f"data.max_text_tokens={max_text_tokens}, or their texts cannot be read.",
        "raise data.max_text_tokens or data.global_batch, or change the mixture "
        "(data.new_phase=true).",
    )


def explain_empty_step(plan: StepPlan, reasons: Iterable[str]) -> OneLLMError:
    """The error of a step of which nothing could be read.

    Args:
        plan: the plan of the step.
        reasons: why, of samples of all ranks.
    """
    kinds = Counter(map(normalise_reason, reasons)).most_common(SHOWN)
    return OneLLMError(
        f"step {plan.step}: none of its {format_count(plan.totals.samples, 'sample')} could be "
        f"read: " + "; ".join(kind for kind, _ in kinds),
        "the step would teach nothing, and its loss would be 0.",
        "look at the storage, the libraries and the shards (`onellm doctor`, `onellm shards "
        "verify`). If the samples are really bad, start the run again: they are known then, and "
        "left out.",
    )
