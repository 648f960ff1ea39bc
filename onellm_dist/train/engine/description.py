"""What an engine says about itself, so that no other room needs its library's names.

A description imports neither torch nor the engine's library: the launching process, the doctor and
the preflight check read it within milliseconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from onellm_dist.config.schema import EngineSection
    from onellm_dist.train.engine.base import Engine, ShardedModel


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes that one rank holds throughout a step, per parameter of the whole model.

    Activations come on top.
    """

    frozen: float
    """On the device, per frozen parameter."""
    trainable: float
    """On the device, per trainable parameter: weight, gradient and optimizer state."""
    trainable_host: float = 0.0
    """In host memory, per trainable parameter, where the optimizer is offloaded."""
    gathered: float = 0.0
    """What of `trainable` is a copy that is gathered for a whole step; the optimizer leaves it
    alone."""


@dataclass(frozen=True)
class BlockSize:
    """Parameters of a transformer block."""

    trainable: int
    frozen: int


@dataclass(frozen=True)
class WeightUses:
    """How many weights one micro-batch reads, in parameters.

    A module counts each time it runs: the encoder, for example, may run twice.
    """

    frozen_forward: float
    """Frozen weights of the modules that run in forward."""
    frozen_backward: float
    """Frozen weights of the modules that gradients pass through."""
    frozen_recomputed: float
    """Frozen weights of the modules whose forward runs again in backward."""
    trained_forward: float
    """Trainable weights of the modules that run in forward."""
    trained_backward: float
    """Trainable weights of the modules that gradients pass through."""
    trained_recomputed: float
    """Trainable weights of the modules whose forward runs again in backward."""
    loose: float = 0.0
    """Weights outside of transformer blocks, embedding and head."""
    loose_reads: float = 0.0
    """How many of the weights that are read in forward and backward are such ones."""
    loose_trained: float = 0.0
    """Trainable weights among `loose`."""
    loose_trained_reads: float = 0.0
    """Reads of trainable weights among `loose_reads`."""

    def pad(self, *, trained: float, frozen: float) -> WeightUses:
        """Compute these reads for weights that are padded.

        Args:
            trained: trainable weights with their padding, over those without.
            frozen: the same of frozen weights.
        """
        loose, reads = self.loose - self.loose_trained, self.loose_reads - self.loose_trained_reads
        return WeightUses(
            frozen_forward=frozen * self.frozen_forward,
            frozen_backward=frozen * self.frozen_backward,
            frozen_recomputed=frozen * self.frozen_recomputed,
            trained_forward=trained * self.trained_forward,
            trained_backward=trained * self.trained_backward,
            trained_recomputed=trained * self.trained_recomputed,
            loose=trained * self.loose_trained + frozen * loose,
            loose_reads=trained * self.loose_trained_reads + frozen * reads,
            loose_trained=trained * self.loose_trained,
            loose_trained_reads=trained * self.loose_trained_reads,
        )


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that collectives give to (gathers) or take from (reductions) each rank.

    A ring moves (ranks - 1) / ranks of them over each link.
    """

    gather_micro_batch: float
    """Weights gathered in each micro-batch."""
    reduce_micro_batch: float
    """Gradients reduced in each micro-batch."""
    gather_step: float
    """Weights gathered once a step, outside of forward and backward."""
    reduce_step: float
    """Gradients reduced once a step, outside of forward and backward."""
    gather_ranks: int
    """Ranks that gather together within passes; neighbours."""
    reduce_ranks: int
    """Ranks that reduce together within passes; neighbours."""
    step_ranks: int
    """Ranks that take part in the collectives of `gather_step` and `reduce_step`."""
    gather_first: float = 0.0
    """Weights gathered once a step, within the first micro-batch's forward."""
    reduce_last: float = 0.0
    """Gradients reduced once a step, within the last micro-batch's backward."""

    def count_gathered(self, micro_batches: int) -> float:
        """Bytes gathered in a step of that many micro-batches."""
        return micro_batches * self.gather_micro_batch + self.gather_first + self.gather_step

    def count_reduced(self, micro_batches: int) -> float:
        """Bytes reduced in a step of that many micro-batches."""
        return micro_batches * self.reduce_micro_batch + self.reduce_last + self.reduce_step


@dataclass(frozen=True)
class HostCosts:
    """Microseconds that an engine's hooks take on the host for each call of a module."""

    forward_us: float
    """In forward, and where it is recomputed."""
    backward_us: float


class EngineDescription(ABC):
    """One engine, described for planner, watchdog, doctor, preflight and configuration check.

    Each engine is a folder in `train/engine/` whose `description.py` defines `DESCRIPTION`, an
    instance of a subclass.
    """

    name: ClassVar[str]
    """The value of `engine.name`."""
    packages: ClassVar[tuple[str, ...]]
    """Distributions whose versions must agree on all nodes."""
    environment_prefixes: ClassVar[tuple[str, ...]] = ()
    """Prefixes of environment variables that change how its library works."""
    waiting_files: ClassVar[tuple[str, ...]] = ()
    """Parts of source paths. A thread whose innermost Python frame is in such a file waits for
    other ranks."""
    wrapper_files: ClassVar[tuple[str, ...]] = ()
    """Ends of source paths. A frame in such a file stands for its caller: it wraps calls of any
    kind."""
    shared_memory_pattern: ClassVar[str] = ""
    """Glob pattern of files that processes of its library may leave in `/dev/shm` when they are
    killed."""

    @abstractmethod
    def load(self) -> type[Engine]:
        """Import the engine's library and return the engine's class."""

    def load_sharded_model(self) -> type[ShardedModel] | None:
        """The class of a model that is sharded to answer, built as `FsdpModel` is; None: none."""
        return None

    @abstractmethod
    def check(self, section: EngineSection, *, bf16: bool) -> None:
        """Refuse a wrong `engine` section; called before any rank starts.

        Args:
            section: the recipe's `engine` section.
            bf16: whether the model computes in bf16.

        Raises:
            UsageError: a key of another engine, or a configuration file that is missing or wrong.
        """

    @abstractmethod
    def read_options(self, section: EngineSection, *, world_size: int) -> Any:
        """What `EngineSettings.options` holds for this engine.

        Raises:
            UsageError: the section is wrong, or does not fit the number of ranks.
        """

    @abstractmethod
    def parameter_bytes(
        self,
        section: EngineSection,
        *,
        world_size: int,
        compute_bytes: int,
        state_bytes: int,
    ) -> ParameterBytes:
        """Estimate what a rank holds per parameter.

        Args:
            section: the recipe's `engine` section.
            world_size: number of ranks.
            compute_bytes: size of a weight in the dtype that the model computes in (2 for bf16, 4
                for fp32).
            state_bytes: size of the fp32 weight and the optimizer state of one parameter (12 for
                AdamW).

        Raises:
            UsageError: the section is wrong.
        """

    @abstractmethod
    def describe(self, section: EngineSection) -> str:
        """Name this engine and its mode for people.

        Raises:
            UsageError: the section is wrong.
        """

    def row_multiple(self, section: EngineSection, *, world_size: int) -> int:
        """Each parameter is sent with its rows padded to a multiple of this; 1: as it is."""
        return 1

    @abstractmethod
    def traffic(
        self,
        section: EngineSection,
        *,
        world_size: int,
        compute_bytes: int,
        trainable: int,
        uses: WeightUses,
    ) -> StepTraffic:
        """Say what its collectives move in a micro-batch and in a step.

        Args:
            section: the recipe's `engine` section.
            world_size: number of ranks.
            compute_bytes: as of `parameter_bytes`.
            trainable: number of trainable parameters, padded to `row_multiple`.
            uses: weights that one micro-batch reads, padded likewise.

        Raises:
            UsageError: the section is wrong.
        """

    @abstractmethod
    def buffer_bytes(
        self,
        section: EngineSection,
        *,
        compute_bytes: int,
        parameters: int,
        largest_unit: int,
        stacks: Sequence[Sequence[BlockSize]],
    ) -> float:
        """Estimate what the engine's library holds on the device for its collectives.

        Args:
            section: the recipe's `engine` section.
            compute_bytes: as of `parameter_bytes`.
            parameters: parameters of the whole model.
            largest_unit: parameters of the largest module that is gathered at once.
            stacks: the blocks of each stack of transformer blocks, in the order in which they run.

        Raises:
            UsageError: the section is wrong.
        """

    @abstractmethod
    def host_costs(self, section: EngineSection, *, frozen_blocks: float) -> HostCosts:
        """What the engine's hooks cost on the host.

        Args:
            section: the recipe's `engine` section.
            frozen_blocks: share of the modules in transformer blocks whose class has no block that
                trains.

        Raises:
            UsageError: the section is wrong.
        """

    def hooks_within_blocks(self, section: EngineSection) -> bool:
        """Whether modules inside a transformer block have hooks, which cannot be compiled.

        Args:
            section: a section that `check` accepts.
        """
        return False

    def find_untimed(self, section: EngineSection) -> str | None:
        """What of these settings the planner cannot time; None: nothing.

        Args:
            section: a section that `check` accepts.
        """
        return None

    @abstractmethod
    def list_choices(self, *, world_size: int, gpus_per_node: int) -> list[dict[str, Any]]:
        """List `engine` sections that the planner's search tries, as keys and values.

        Args:
            world_size: number of ranks.
            gpus_per_node: ranks on a node.
        """
