"""What every inference engine is: a frozen config with one method, ``run``."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import numpy as np

from .._typing import Key
from ..checkpoint import Checkpoint
from ..log_density import LogDensity
from ..posterior import Posterior


class ProgressCallback(Protocol):
    """Called between compiled chunks."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` iterations of ``stage`` are behind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunControl:
    """What goes on around a run without being part of the algorithm.

    Attributes
    ----------
    on_progress : told about every chunk.
    checkpoint : folder the run is saved to and continued from.
    seconds : sampling ends after this much wall-clock time.
    is_enough : sampling ends when this holds for the draws so far, ``(chain, draw, size)``.
    warm_start : ``Posterior.adaptation`` of an earlier run over the same position, to start from.
    enough_independent : draws of each chain that satisfy every stopping rule, provided they are independent.
    interrupted : whether Ctrl-C was meant for this run, where it runs in another thread than the one that gets it.
    """

    on_progress: ProgressCallback | None = None
    checkpoint: Checkpoint | None = None
    seconds: float | None = None
    is_enough: Callable[[np.ndarray], bool] | None = None
    warm_start: dict[str, Any] | None = None
    enough_independent: int | None = None
    interrupted: Callable[[], bool] | None = None

    def independent_draws(self, num_samples: int) -> int:
        """How many draws of each chain to make where draws are independent, at most ``num_samples``."""
        return num_samples if self.enough_independent is None else min(num_samples, self.enough_independent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(abc.ABC):
    """An algorithm that turns a log density into a posterior.

    A config holds what a user may choose and nothing else; ``run`` is pure.
    """

    one_core: ClassVar[bool] = False
    """Whether a chain keeps one core busy for long, and ends when ``RunControl.interrupted`` says so."""

    @abc.abstractmethod
    def run(
        self,
        key: Key,
        log_density: LogDensity,
        start: np.ndarray,
        *,
        num_warmup: int,
        num_samples: int,
        num_chains: int = 1,
        control: RunControl = RunControl(),
    ) -> Posterior:
        """Draw ``num_samples`` positions in each of ``num_chains`` chains, starting near ``start`` (size,)."""
