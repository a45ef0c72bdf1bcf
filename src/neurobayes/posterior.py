"""Draws from a posterior, with how they were made."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Draws of the flat position, and what the sampler reported on the way.

    Attributes
    ----------
    draws : (chain, draw, size) positions: random weights, then unconstrained noise.
    stats : per-draw reports, each (chain, draw): ``diverging``, ``num_steps``, ``accept_prob``, ``energy`` …
    info : one entry per run: engine, seconds, step size, tree depth limit, versions.
    adaptation : what a later run over the same position can start from: last positions, step size, mass matrix.
    """

    draws: np.ndarray
    stats: dict[str, np.ndarray]
    info: dict[str, Any]
    adaptation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return self.draws.shape[0]

    @property
    def num_draws(self) -> int:
        """Draws per chain."""
        return self.draws.shape[1]

    @property
    def flat_draws(self) -> np.ndarray:
        """All draws of all chains, shape (chain * draw, size)."""
        return self.draws.reshape(self.num_chains * self.num_draws, self.draws.shape[-1])
