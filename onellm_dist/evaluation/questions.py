"""What is asked, what is answered, and what every scorer reads: records without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question of a benchmark, as the source stored it."""

    id: str
    """Unique in the benchmark."""
    text: str = ""
    """The question as the benchmark has it; "" where a caption is asked for."""
    options: Sequence[str] = ()
    """The options of a multiple-choice question, A first."""
    answers: Sequence[str] = ()
    """All reference answers; for options, the letter of the right one."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Categories of the question: table of the report -> row."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What prompts, scorers and answer files need besides (hint, official ids)."""
    medium: str = ""
    """What the question is about: questions about one medium share it."""

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value or key == "id"}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BenchmarkQuestion:
        """Convert from the result of `to_json`."""
        return cls(**value)


@dataclass(frozen=True)
class GivenAnswer:
    """A question and what the model answered."""

    question: BenchmarkQuestion
    text: str
    """The answer, without special tokens."""
    asked: str = ""
    """The words it was asked with, for answer files."""
