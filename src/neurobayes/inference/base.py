"""What every inference engine is: a frozen config with one method, ``run``."""

import abc
import dataclasses
from typing import Protocol

import numpy as np

from .._typing import Key
from ..log_density import LogDensity
from ..posterior import Posterior


class ProgressCallback(Protocol):
    """Called between compiled chunks."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` iterations of ``stage`` are behind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(abc.ABC):
    """An algorithm that turns a log density into a posterior.

    A config holds what a user may choose and nothing else; ``run`` is pure.
    """

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
        on_progress: ProgressCallback | None = None,
    ) -> Posterior:
        """Draw ``num_samples`` positions in each of ``num_chains`` chains, starting near ``start`` (size,)."""
