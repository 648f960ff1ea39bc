"""What becomes of the inputs of the fuzz room: the outcomes, and the report of a surface."""

from __future__ import annotations

import base64
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

FINE = "fine"
"""The input was read, and the surface's own assertions about it held."""
REFUSED = "refused in words"
"""An error of the product's own, with a reason."""
RAW = "raw"
"""Another exception, or one whose words are of another kind than the product's."""
WRONG = "silently wrong"
"""An assertion of the surface failed: a value came back that is not the true one."""
HANG = "hang"
MEMORY = "memory"
CRASH = "crash"
"""The process died (SIGSEGV, the interpreter's end)."""

Surface = Callable[[bytes], object]


@dataclass(frozen=True)
class FuzzFailure:
    """One case that was neither fine nor refused in words."""

    case: int
    outcome: str
    detail: str
    data: bytes

    def __str__(self) -> str:
        """Case, outcome, where it happened, and the input (its start, if it is long)."""
        text = base64.b64encode(self.data[:3000]).decode()
        return f"case {self.case}: {self.outcome}: {self.detail}\n  base64 of the input: {text}"


@dataclass
class FuzzReport:
    """What happened to all cases of a surface."""

    surface: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[FuzzFailure] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """How many inputs were tried."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        """One line of figures."""
        found = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{self.surface}: {self.cases} cases in {self.seconds:.1f} s: {found}"

    def require_clean(self, least_refused: int = 1) -> None:
        """Fail unless every case was fine or refused in words, and some were refused.

        Args:
            least_refused: a fuzzer whose inputs are all fine has tried nothing.
        """
        print(self)
        kinds = {f"{f.outcome}: {f.detail}": f for f in reversed(self.failures)}
        shown = "\n".join(str(f) for f in sorted(kinds.values(), key=lambda f: f.case)[:8])
        assert not self.failures, f"{self}\n{len(kinds)} kinds of failure\n{shown}"
        assert self.counts[REFUSED] >= least_refused, str(self)


def classify(
    run: Surface, data: bytes, allowed: tuple[type[BaseException], ...]
) -> tuple[str, str]:
    """Run one input in this process; return its outcome and where an exception came from."""
    try:
        run(data)
    except allowed as error:
        return (
            (REFUSED, "") if str(error).strip() else (RAW, f"{type(error).__name__} without words")
        )
    except AssertionError as error:
        return WRONG, _describe(error)
    except MemoryError as error:
        return MEMORY, _describe(error)
    except Exception as error:
        return RAW, _describe(error)
    return FINE, ""


def _describe(error: BaseException) -> str:
    """Exception, its first line, and the innermost line of the product that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "onellm_dist" in f.filename] or frames[-1:]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return (
        f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}{where}"
    )
