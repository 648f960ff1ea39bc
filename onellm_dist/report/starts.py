"""One start of a run: when its nodes were held, which steps it did, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from onellm_dist.report.entries import Entry, pick, to_number

STARTUP_PARTS = (
    "scheduler",
    "job",
    "imports",
    "process_group",
    "model",
    "engine",
    "checkpoint",
    "data",
    "first_step",
)
"""Parts of the time from the end of the previous start to the end of the first new step.

`scheduler` is the wait for nodes; `job` is what the job script does before Python begins
(preflight, container, launcher). The run itself records the others.
"""


@dataclass
class Start:
    """One start, from the moment its nodes were allocated to the moment they were free again."""

    number: int
    """1 for the first start of the run."""
    begin: float
    """Seconds since 1970."""
    end: float
    """Seconds since 1970; NaN until it is known."""
    begin_known: bool
    """Whether the job script recorded the begin; otherwise the run's events give an estimate."""
    end_known: bool
    """Whether somebody recorded the end."""
    world_size: int
    """Number of ranks; 1 if no record says it."""
    status: str
    """`running`, `done`, `preempted`, `failed`, `usage`, or `lost` (ended without a record: killed,
    or its node died)."""
    reason: str
    nodes: int | None = None
    """Number of nodes."""
    node_list: str = ""
    job: str = ""
    """Slurm's job id."""
    restart: int | None = None
    """How often Slurm had requeued the job before this start."""
    device: str = ""
    device_name: str = ""
    """What the device calls itself."""
    first_step: int | None = None
    """Index of its first step; None if it never trained."""
    steps_done: int | None = None
    """Steps of the run that were done when it ended."""
    failed_step: int | None = None
    """Index of the step in progress when it failed."""
    offending_samples: list[str] = field(default_factory=list)
    """Ids of the samples in progress when it failed."""
    responsible_host: str = ""
    """The node that the watchdog holds responsible for a hang."""
    startup_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by part, see `STARTUP_PARTS`."""
    trained_at: float | None = None
    """When everything was built and the first step was about to begin."""
    steps: list[Entry] = field(default_factory=list)
    """Valid lines of `metrics.jsonl` that this start wrote."""
    repeats: tuple[int, float] | None = None
    """Steps of earlier starts, and their seconds, that this one reports it has to repeat; None if
    it reports nothing."""
    lost_steps: int = 0
    """Steps it had done that a later start, or a rollback, had to repeat."""
    lost_seconds: float = 0.0
    lost_known: bool = True
    """False if the lost seconds are an estimate: the count times the run's median step."""
    checkpoints: list[Entry] = field(default_factory=list)
    rollbacks: list[Entry] = field(default_factory=list)
    validation_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Time for which its nodes were held."""
        return max(0.0, self.end - self.begin)


def get_stall_seconds(checkpoint: Entry) -> float:
    """Seconds for which training paused for a checkpoint.

    Fewer than `seconds` if the checkpoint was written in the background.
    """
    return to_number(pick(checkpoint, "stall_seconds", "seconds"))


def compute_process_seconds(start: Start) -> float:
    """Seconds from the begin of rank 0's process to the first step.

    The wait for the first step's data is part of that step and left out.
    """
    waited = 0.0
    if start.steps:
        first = start.steps[0]
        waited = to_number(first.get("seconds")) * to_number(first.get("data_wait_fraction"))
    recorded = sum(s for name, s in start.startup_seconds.items() if name != "first_step")
    return max(0.0, recorded - waited)


def compute_resume_seconds(start: Start) -> float | None:
    """Seconds from the end of the previous start to the end of the first new step.

    None if no start-up timing was recorded.
    """
    if not set(start.startup_seconds) - {"scheduler"}:
        return None
    return sum(start.startup_seconds.values())
